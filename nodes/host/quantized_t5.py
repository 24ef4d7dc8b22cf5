"""The host's PixArt text encoder with quantized linear layers, filled while it is built, so that its size is right from the start."""
from __future__ import annotations

from typing import Any

import comfy.model_management as management
import comfy.ops
import comfy.text_encoders.pixart_t5 as pixart_t5
import torch

from ...pixart.errors import TextEncoderError
from ...pixart.text.names import FP8, INT8
from ...pixart.text.quantize import COMPUTE, QuantizedLinear, check_available, fill_layers
from ...pixart.text.weights import EMBEDDING, T5Weights

# 4 bits, their scale in 8 bits for every 64 values, and its own; an estimate for the host's choice of device
BYTES_PER_VALUE = {INT8: 1.0}
FOUR_BITS = 0.52
FINGERPRINT = "pixart_fingerprint"  # on a T5 of the host that rounds what a fingerprint is made of


class QuantizedOperations(comfy.ops.manual_cast):
    """The host's layers, but packed linear ones: the host moves them as modules and never casts them."""

    class Linear(QuantizedLinear):
        """Left in main memory where the card is short: it then fetches its weight for each product."""

        comfy_cast_weights = True


def quantized_clip_class(weights: T5Weights, precision: str, options: dict[str, Any]) -> type:
    """The class that the host's CLIP instantiates, once. `weights` are quantized on the loading device, if they aren't yet."""
    check_available(weights, precision)  # before anything is built
    quantize_on = options.get("load_device", management.text_encoder_device())
    given = [weights]  # emptied: the class lives as long as the CLIP, and `weights` may hold all tensors of the file

    class QuantizedT5(pixart_t5.pixart_te(dtype_t5=COMPUTE)):
        """The host's PixArt T5."""

        def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: dict[str, Any] = {}) -> None:  # noqa: B006
            super().__init__(device=device, dtype=dtype, model_options={**model_options, "custom_operations": QuantizedOperations})
            t5, source = self.t5xxl.transformer, given.pop()
            others = fill_layers(t5, source, precision, quantize_on, device)
            missing, unknown = t5.load_state_dict(others, strict=False)
            missing = [name for name in missing if not isinstance(t5.get_submodule(name.rpartition(".")[0]), QuantizedLinear)]
            if missing or unknown:
                raise TextEncoderError(
                    f"{source.path}: this ComfyUI's T5 lacks {', '.join(unknown) or 'nothing'} and wants {', '.join(missing)}."
                )

    return QuantizedT5


def resident_estimate(weights: T5Weights, precision: str) -> int:
    """Bytes the encoder will take: known layers are counted, others estimated."""
    per_value = BYTES_PER_VALUE.get(precision, FOUR_BITS)
    total = sum(torch.Size(part.shape).numel() for parts in weights.layers.values() for part in parts.values())
    for name, stored in weights.stored.items():
        linear = len(stored.shape) == 2 and name != EMBEDDING and weights.precision is None
        total += int(torch.Size(stored.shape).numel() * (per_value if linear else COMPUTE.itemsize))
    return total


def precision_of(t5: torch.nn.Module) -> str:
    """int8, nf4, fp4 or fp8_e4m3fn, else the dtype of the layers, of a T5 of the host: as the core names them."""
    query = t5.encoder.block[0].layer[0].SelfAttention.q
    if isinstance(query, QuantizedLinear):
        return query.state.get("quant_type", INT8)
    return FP8 if query.weight.dtype == torch.float8_e4m3fn else str(query.weight.dtype).removeprefix("torch.")
