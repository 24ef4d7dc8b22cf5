"""The card's tensors: what each operation of torch does with them."""
from __future__ import annotations

import traceback
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CARD, CPU = torch.device("cuda", 0), torch.device("cpu")
HERE = Path(__file__).resolve().parent
aten = torch.ops.aten
# A card has to be waited for where the number, or the size, of a result must be known
WAITING = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.is_nonzero.default,
    aten.masked_select.default, aten._unique2.default,
}  # fmt: skip
# Indexing is the one operation that takes CPU tensors beside a card's: it copies them
INDEXING = {
    aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default, aten._unsafe_index.Tensor,
}  # fmt: skip


@dataclass(frozen=True)
class Event:
    """A copy to the card, a copy from it, or a wait; with its bytes and the line that asked for it."""

    kind: str  # "to card", "from card" or "wait"
    detail: str
    bytes: int
    where: str


LOG: list[Event] = []
_alive: weakref.WeakSet = weakref.WeakSet()


class CardTensor(torch.Tensor):
    """A tensor on the card; its numbers are in `held`, a CPU tensor."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> CardTensor:
        shape = torch.empty_strided(held.size(), held.stride(), dtype=held.dtype, device="meta")
        self = torch.Tensor._make_subclass(cls, shape, False, dispatch_device=True, device_for_backend_keys=CARD)
        self.held = held
        _alive.add(self)
        return self

    __hash__ = object.__hash__
    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CARD)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    is_meta = property(lambda self: False)

    def get_device(self) -> int:
        return 0

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def __repr__(self) -> str:
        return f"CardTensor({self.held!r})"

    def tolist(self) -> Any:
        record("from card", "tolist", self.held.nbytes)
        return self.held.tolist()

    def numpy(self) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first.")

    def __deepcopy__(self, memo: dict) -> CardTensor:
        return CardTensor(self.held.clone())

    def new_tensor(self, data: Any, **options: Any) -> Tensor:
        return torch.tensor(data, **{"device": CARD, "dtype": self.dtype, **options})

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return dispatch(function, args, kwargs or {})


class Mode(TorchDispatchMode):
    """Sends operations that make tensors on "cuda" to the card as well."""

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return dispatch(function, args, kwargs or {})


def used_bytes() -> int:
    """Of everything alive on the card; storages that are shared count once."""
    storages = {each.held.untyped_storage().data_ptr(): each.held.untyped_storage().nbytes() for each in list(_alive)}
    return sum(storages.values())


def record(kind: str, detail: str, size: int = 0) -> None:
    """Writes an event down with the last three lines outside of torch and this folder."""
    frames = [
        frame for frame in traceback.extract_stack(limit=60)
        if "site-packages" not in frame.filename and HERE != Path(frame.filename).parent
    ]  # fmt: skip
    where = " < ".join(f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno}" for frame in reversed(frames[-3:]))
    LOG.append(Event(kind, detail, size, where))


def held(value: Any) -> Any:
    """A card tensor's numbers; anything else as it is."""
    return value.held if isinstance(value, CardTensor) else value


def names_card(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def dispatch(function: Any, args: tuple, kwargs: dict) -> Any:
    """One operation of torch, with the card's rules."""
    if function is torch.ops.prim.device.default:
        return CARD if isinstance(args[0], CardTensor) else function(*args)
    if function is aten._to_copy.default:
        return _move(function, args[0], kwargs)
    if function is aten.copy_.default:
        return _copy_into(function, args, kwargs)
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    own = [each for each in tensors if isinstance(each, CardTensor)]
    if not own and not names_card(kwargs.get("device")):
        return function(*args, **kwargs)
    if own:
        _refuse_strangers(function, args, tensors)
        if function in WAITING:
            record("wait", function.__name__.split(".")[0])
    options = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory")}
    if kwargs.get("device") is not None:
        options["device"] = CPU
    made = function(*tree_map(held, args), **tree_map(held, options))
    known = {id(each.held): each for each in own}  # what an operation in place, or with `out`, gives back

    def back(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return known[id(value)] if id(value) in known else CardTensor(value)

    return tree_map(back, made)


def _move(function: Any, source: Tensor, kwargs: dict) -> Tensor:
    """`tensor.to(...)`."""
    target = kwargs.get("device")
    from_card = isinstance(source, CardTensor)
    to_card = from_card if target is None else names_card(target)
    if from_card != to_card:
        record("to card" if to_card else "from card", "to", held(source).nbytes)
    options = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    if target is not None and torch.device(target).type != "meta":
        options["device"] = CPU
    made = function(held(source), **options)
    made = made.data if isinstance(made, torch.nn.Parameter) else made
    made = made.clone() if made is held(source) else made
    return CardTensor(made) if to_card else made


def _copy_into(function: Any, args: tuple, kwargs: dict) -> Tensor:
    """`target.copy_(source)`, the one operation besides `to` that crosses over."""
    target, source = args[:2]
    if isinstance(target, CardTensor) != isinstance(source, CardTensor):
        record("to card" if isinstance(target, CardTensor) else "from card", "copy_", held(source).nbytes)
    function(held(target), held(source), *args[2:], **kwargs)
    return target


def _refuse_strangers(function: Any, args: tuple, tensors: list[Tensor]) -> None:
    """A CPU tensor beside a card's is an error unless it is one number, as with CUDA."""
    strangers = [each for each in tensors if not isinstance(each, CardTensor) and each.dim() > 0 and each.device.type == "cpu"]
    if strangers and function in INDEXING and isinstance(args[0], CardTensor):
        record("to card", "index", strangers[0].nbytes)
    elif strangers:
        shapes = [tuple(each.shape) for each in strangers]
        raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu in {function} ({shapes})")
