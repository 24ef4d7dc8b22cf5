"""FSDP2: the processes share weights, gradients and the optimizer's state, each holding a slice of every tensor."""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

_gathered: dict[int, Tensor] = {}  # id of a sharded parameter -> the whole of it, inside `gathered`


def shard_model(model: nn.Module, blocks: Iterable[nn.Module], device: torch.device) -> None:
    """Shards each block, then the rest, in place. Packed weights (fp8, nf4) are frozen and stay whole in every process.

    The rest is shared again behind every forward, as blocks are: after one that no backward follows, of samples or a teacher,
    the next would else compute with the weights of then.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    inside = set(model.modules())  # a ControlNet's base is outside, and stays whole
    whole = {parameter for parameter in model.parameters() if parameter.element_size() == 1}
    for module in (*(block for block in blocks if block in inside), model):
        fully_shard(module, mesh=mesh, ignored_params=whole & set(module.parameters()), reshard_after_forward=True)


def whole_tensor(value: Tensor) -> Tensor:
    """The tensor that the processes share slices of; every process calls it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def whole_tensors(values: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """All of them, one after the other, in the memory of the CPU where they were sharded; `keep` False only takes part."""
    whole = {}
    for name, value in values.items():
        full = whole_tensor(value.detach())
        if keep:
            whole[name] = full.cpu() if isinstance(value, DTensor) else full
    return whole


@contextmanager
def gathered(network: nn.Module, keep: bool) -> Iterator[None]:
    """Inside, `full_state` has all of the network's tensors where `keep` is True; every process enters it."""
    sharded = {name: value for name, value in network.state_dict(keep_vars=True).items() if isinstance(value, DTensor)}
    whole = whole_tensors(sharded, keep)
    _gathered.update({id(sharded[name]): value for name, value in whole.items()})
    try:
        yield
    finally:
        _gathered.clear()


def full_state(network: nn.Module) -> dict[str, Tensor]:
    """`network.state_dict()` with whole tensors; `network` may be a part of the one in training.

    Raises RuntimeError where a tensor is sharded and the loop hasn't gathered it: only `Method.write` may call this.
    """
    state = {}
    for name, value in network.state_dict(keep_vars=True).items():
        if isinstance(value, DTensor) and id(value) not in _gathered:
            raise RuntimeError(f"{name} is shared among processes and was not gathered; call full_state in Method.write.")
        state[name] = _gathered.get(id(value), value).detach()
    return state
