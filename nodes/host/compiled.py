"""torch.compile around the network, as the host's TorchCompileModel puts it there: one graph for every size."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

COMPILE_SETTINGS = "torch_compile_kwargs"  # where the host notes the node's choices, among the options of a MODEL
RECORDS_SIZES = "cudagraphs"  # a backend that replays kernels of one size
BATCH, TOKENS, ROWS, COLUMNS = 0, 1, 2, 3


@contextmanager
def any_size(network: Any, model_options: dict[str, Any]) -> Iterator[None]:
    """Within it torch.compile makes graphs of `network` for pictures, prompts and batches of any size.

    By itself it makes one for the first size, and one for all others when it meets the second: the full-size model is
    then compiled twice. Without effect on a network that isn't compiled, and where the user chose `dynamic`, or the
    backend that records kernels.
    """
    settings = model_options.get(COMPILE_SETTINGS, {})
    if not is_compiled(network) or settings.get("dynamic") is not None or settings.get("backend") == RECORDS_SIZES:
        yield
        return
    with network.register_forward_pre_hook(_mark_inputs, with_kwargs=True):
        yield


def is_compiled(network: Any) -> bool:
    """Whether it stands in torch.compile's wrapper."""
    return hasattr(network, "_orig_mod")


def _mark_inputs(network: Any, args: Sequence[Any], given: dict[str, Any]) -> None:
    """args: latent, timesteps; given: of HostTransformer.forward, by name. All are tensors of this step or run, none of the user's."""
    latent, timesteps = args[:2]
    _mark([latent], BATCH, ROWS, COLUMNS)
    _mark([timesteps, given.get("size")], BATCH)
    _mark([given.get("context"), given.get("context_mask"), given.get("crossattn_controlnet")], BATCH, TOKENS)
    _mark((given.get("control") or {}).get("input", ()), BATCH, TOKENS)
    _mark(given.get("positions") or (), 0)


def _mark(tensors: Sequence[Tensor | None], *sides: int) -> None:
    """Hints only: where a graph must know a side, as it does of a single picture, it is made for that."""
    for tensor in tensors:
        if tensor is not None:
            torch._dynamo.maybe_mark_dynamic(tensor, sides)
