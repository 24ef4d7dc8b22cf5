"""Linear layers in 8 or 4 bits: weights from bitsandbytes, kept so that moving, counting or saving them changes nothing.

bitsandbytes' own layers repack 4-bit weights at the first run on an AVX512-BF16 CPU, and a later `state_dict()` (which
ComfyUI calls to count bytes) then spoils them; its int8 layer computes in fp16, in which T5's `wo` overflows. Here the
packed weights are plain buffers, and products are taken in bf16.
"""
from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import TextEncoderError, UnsupportedError
from .names import FP4, FP8, INT8, NF4, PRECISIONS
from .packed import PARTS, SCALES, STATE, WEIGHT, check_parts, read_state
from .weights import T5Weights

COMPUTE = torch.bfloat16
CHUNK = 2**20  # values quantized at once: bitsandbytes needs up to a hundred bytes for each meanwhile
BLOCK, NESTED_BLOCK = 64, 256  # values sharing a 4-bit scale, and scales sharing one of theirs: bitsandbytes' defaults
LARGEST = {FP8: 448.0, INT8: 65504.0}  # bitsandbytes quantizes to int8 from fp16
WITHOUT = "bf16 and fp8_e4m3fn work without it"


class QuantizedLinear(nn.Module):
    """x W^T with W in int8 (one scale a row), nf4 or fp4 (bitsandbytes, double quantization), or fp8.

    Empty until `quantize` or `fill`. Its parts are buffers; those on another device are fetched for each product,
    so that an encoder may stay in main memory and pass through the card layer by layer.
    """

    weight = bias = None  # transformers and ComfyUI look at them

    def __init__(self, in_features: int, out_features: int, bias: bool = False, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        if bias:
            raise UnsupportedError("A quantized layer can't have a bias; T5's have none.")
        self.in_features, self.out_features = in_features, out_features
        self.state: dict[str, Any] = {}  # of 4 bits: quant_type, blocksize, ...

    def quantize(self, weight: Tensor, precision: str, device: torch.device | str, where: str = "a layer") -> None:
        """Takes over `weight` (out, in), quantized on `device`. Raises TextEncoderError or UnsupportedError saying what to do."""
        check_range(weight, precision, where)
        self.fill(quantize_weight(weight, precision, torch.device(device)), device, where)

    def fill(self, parts: dict[str, Tensor], device: torch.device | str, where: str = "a quantized layer") -> None:
        """Takes over the parts of a quantized weight, named as in `packed.PARTS`; raises TextEncoderError if they don't fit."""
        check_parts(parts, (self.out_features, self.in_features), where)
        self.state = read_state(parts[STATE], where) if STATE in parts else {}
        self._buffers.clear()  # what it was filled with before may have had other parts
        for part, value in parts.items():
            value = value.to(device).contiguous()
            self.register_buffer(part, value.reshape(self.out_features, -1) if part == WEIGHT and not self.state else value.flatten())

    def parts(self) -> dict[str, Tensor]:
        """The parts of the weight; {} before the layer is filled."""
        return dict(self._buffers)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the dtype of x."""
        parts = {part: value.to(x.device, non_blocking=True) for part, value in self._buffers.items() if part != STATE}
        if self.state:
            out = F.linear(x.to(COMPUTE), self.unpack(parts))
        else:
            out = F.linear(x.to(COMPUTE), parts[WEIGHT].to(COMPUTE))  # int8 values are exact in bf16
        if SCALES in parts:
            out = out * (parts[SCALES] / 127)
        return out.to(x.dtype)

    def unpack(self, parts: dict[str, Tensor]) -> Tensor:
        """The 4-bit weight in bf16, (out, in); parts: of this layer, on the device of computation."""
        functional = bitsandbytes(self.state["quant_type"]).functional
        offset = nested = None
        if "nested_absmax" in parts:
            offset = self.state["nested_offset"]
            nested = functional.QuantState(
                absmax=parts["nested_absmax"],
                code=parts["nested_quant_map"],
                blocksize=self.state["nested_blocksize"],
                dtype=torch.float32,
            )
        state = functional.QuantState(
            absmax=parts["absmax"],
            shape=torch.Size((self.out_features, self.in_features)),
            code=parts["quant_map"],
            blocksize=self.state["blocksize"],
            quant_type=self.state["quant_type"],
            dtype=COMPUTE,
            offset=offset,
            state2=nested,
        )
        with _native("unpack", self.state["quant_type"], parts[WEIGHT].device):
            return functional.dequantize_4bit(parts[WEIGHT].unsqueeze(1), state)

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, local_metadata: dict, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """Through `fill`: `state` must be that of the parts, whatever the layer held before."""
        parts = {part: state_dict[prefix + part] for part in PARTS if prefix + part in state_dict}
        if parts:
            kept = next(iter(self._buffers.values()), parts.get(WEIGHT))
            self.fill(parts, "cpu" if kept is None else kept.device, prefix.rstrip("."))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """Moves the parts, but never casts them: `.to(bfloat16)` would round the scales."""
        return super()._apply(lambda t: fn(t.view(torch.uint8)).view(t.dtype) if t.is_floating_point() else fn(t), recurse)


def quantize_weight(weight: Tensor, precision: str, device: torch.device) -> dict[str, Tensor]:
    """The parts of a quantized weight (out, in), in main memory or on the card; about a million values at a time."""
    if precision not in PRECISIONS:
        raise UnsupportedError(f"precision is {precision!r}; expected one of {', '.join(PRECISIONS)}.")
    if precision == FP8:
        return {WEIGHT: weight.to(device).to(torch.float8_e4m3fn)}
    functional = bitsandbytes(precision).functional
    weight = weight if weight.dtype.itemsize > 1 else weight.to(COMPUTE)
    with _native("make", precision, device):
        if precision == INT8:
            return _quantize_int8(functional, weight, device)
        return _quantize_4bit(functional, weight, precision, device)


def check_range(weight: Tensor, precision: str, where: str) -> None:
    """Raises TextEncoderError for values beyond the precision: a cast gives NaN, and clamping would be wrong in silence."""
    if precision not in LARGEST or weight.dtype.itemsize == 1:
        return
    low, high = weight.aminmax()
    largest = max(float(-low), float(high))
    if largest > LARGEST[precision]:
        others = "int8, nf4, fp4 or bf16" if precision == FP8 else "nf4, fp4 or bf16"
        raise TextEncoderError(
            f"{where} has a weight of {largest:g}; {precision} holds up to {LARGEST[precision]:g}. Choose the precision {others} for "
            "this T5."
        )


@contextmanager
def _native(what: str, precision: str, device: torch.device) -> Iterator[None]:
    """Around bitsandbytes' kernels, which not every device has; memory that runs out is the caller's to handle."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # NotImplementedError is one
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UnsupportedError(f"bitsandbytes can't {what} {precision} on {device} ({reason}); {WITHOUT}, or choose the CPU.") from error


def _quantize_int8(functional: ModuleType, weight: Tensor, device: torch.device) -> dict[str, Tensor]:
    """One scale a row, as bitsandbytes' own layer has it."""
    values = torch.empty(weight.shape, dtype=torch.int8, device=device)  # at once: pieces would split the heap
    scales = torch.empty(weight.shape[0], dtype=torch.float32, device=device)
    rows = max(1, CHUNK // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        part = slice(start, start + rows)
        values[part], scales[part], _ = functional.int8_vectorwise_quant(weight[part].to(device).half())
    return {WEIGHT: values, SCALES: scales}


def _quantize_4bit(functional: ModuleType, weight: Tensor, precision: str, device: torch.device) -> dict[str, Tensor]:
    """As functional.quantize_4bit with compress_statistics, whose scales of scales need all blocks at once."""
    packed = torch.empty((weight.numel() + 1) // 2, dtype=torch.uint8, device=device)  # at once, too
    absmax = torch.empty(-(-weight.numel() // BLOCK), dtype=torch.float32, device=device)
    for start, part in zip(range(0, weight.numel(), CHUNK), weight.reshape(-1).split(CHUNK)):
        values, state = functional.quantize_4bit(part.to(device), blocksize=BLOCK, compress_statistics=False, quant_type=precision)
        packed[start // 2 : start // 2 + values.numel()] = values.flatten()
        absmax[start // BLOCK : start // BLOCK + state.absmax.numel()] = state.absmax
    offset = absmax.mean()
    absmax, nested = functional.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
    blob = {
        "quant_type": precision, "blocksize": BLOCK, "dtype": "bfloat16", "shape": list(weight.shape),
        "nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": float(offset),
    }  # fmt: skip
    return {
        WEIGHT: packed,
        "absmax": absmax,
        "quant_map": state.code.clone(),
        "nested_absmax": nested.absmax,
        "nested_quant_map": nested.code.clone(),
        STATE: torch.tensor(list(json.dumps(blob).encode()), dtype=torch.uint8),
    }


def replace_linears(model: nn.Module) -> None:
    """Puts an empty QuantizedLinear in the place of every Linear; `model` may be on the meta device."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            model.set_submodule(name, QuantizedLinear(module.in_features, module.out_features))


def fill_layers(
    model: nn.Module,
    weights: T5Weights,
    precision: str,
    device: torch.device | str,
    home: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """Fills every QuantizedLinear of `model`, reading and quantizing one at a time; returns the other tensors, in bf16.

    device: where to quantize; home: where to keep the results (default: there). Layers that the file has quantized are
    taken as they are; others in such a file stay bf16.
    """
    check_available(weights, precision)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    home = device if home is None else home
    for name, parts in weights.stream_packed():
        if name not in layers:
            raise TextEncoderError(f"{weights.path}: {name} is quantized, but is not a linear layer. Quantize the original again.")
        layers[name].fill(parts, home, f"{weights.path}: {name}")
    others = {}
    for name, tensor in weights.raw():
        layer = layers.get(name.removesuffix(".weight"))
        if layer is None:
            others[name] = tensor.to(home, COMPUTE)
        elif weights.precision is not None:
            layer.fill({WEIGHT: tensor.to(COMPUTE)}, home)
        else:
            layer.quantize(tensor, precision, device, f"{weights.path}: {name}")
            layer.to(home)
    return others


def choose_precision(weights: T5Weights, wanted: str | None) -> str | None:
    """The precision to load in; raises UnsupportedError if the file is quantized otherwise already."""
    if weights.precision is not None and wanted not in (None, weights.precision):
        raise UnsupportedError(
            f"{weights.path} is already quantized to {weights.precision}; {wanted} was asked for. Choose the default or "
            f"{weights.precision}, or give the original weights."
        )
    return weights.precision or (wanted if wanted in PRECISIONS else None)


def check_available(weights: T5Weights, precision: str) -> None:
    """Raises unless bitsandbytes is here, where the precision needs it: int8 does for quantizing alone."""
    if precision in (NF4, FP4) or (precision == INT8 and weights.precision is None):
        bitsandbytes(precision)


def bitsandbytes(precision: str) -> ModuleType:
    """The library; raises TextEncoderError saying how to install it, UnsupportedError if it doesn't start here."""
    try:
        import bitsandbytes as library
    except ImportError as error:
        reason = "" if error.name == "bitsandbytes" else f" ({error})"
        raise TextEncoderError(f"{precision} needs bitsandbytes{reason}: `pip install bitsandbytes`; {WITHOUT}.") from None
    except Exception as error:  # its native library may fail in any way
        raise UnsupportedError(f"bitsandbytes, which {precision} needs, doesn't start here ({error}); {WITHOUT}.") from error
    return library


def resident_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    kept = {value.data_ptr(): value for value in (*model.parameters(), *model.buffers()) if value.numel()}
    return sum(value.numel() * value.element_size() for value in kept.values())
