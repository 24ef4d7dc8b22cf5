"""What callers may give in place of a prompt: embeddings, a prompt file, or states with their mask."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..habits import described
from .embeddings import TextEmbeddings
from .prompt_file import load_prompts


def given_embeddings(name: str, given: Any, mask: Tensor | None, width: int) -> TextEmbeddings | None:
    """Embeddings of captions `width` wide from an argument called `name`; raises InputError for anything that is none of these."""
    if mask is not None and not isinstance(given, Tensor):
        raise InputError(f"A mask was given, but {name} is {type(given).__name__}; expected a tensor of states beside it.")
    if given is None or isinstance(given, TextEmbeddings):
        return given
    if isinstance(given, (str, Path)):
        return load_prompts(given, width).embeddings
    if isinstance(given, Tensor) and given.ndim == 3 and given.is_floating_point():
        mask = torch.ones(given.shape[:2], dtype=torch.bool) if mask is None else mask
        if mask.ndim == 2:  # a mask of another size is refused with both sizes
            return TextEmbeddings(given, mask.to(given.device) != 0)
    raise InputError(
        f"{name} is {described(given)}{'' if mask is None else f' with a mask {tuple(mask.shape)}'}; expected what encode() returns, "
        "a prompt file, or states (prompts, tokens, width) with a mask (prompts, tokens)."
    )


def check_embeddings(name: str, part: TextEmbeddings, width: int) -> None:
    """Raises InputError unless states and mask have the shapes (prompts, tokens, width) and (prompts, tokens)."""
    if part.states.ndim != 3 or part.states.shape[2] != width or part.mask.shape != part.states.shape[:2]:
        source = f" ({part.source})" if part.source else ""
        raise InputError(
            f"{name}{source} has states {tuple(part.states.shape)} and mask {tuple(part.mask.shape)}; "
            f"expected (prompts, tokens, {width}) and (prompts, tokens)."
        )
