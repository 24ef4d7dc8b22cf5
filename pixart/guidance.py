"""Perturbed-attention and skip-layer guidance: which blocks a weakened prediction changes, and how."""
from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from .errors import InputError
from .layers import BlockInputs
from .timesteps import LAST_TIMESTEP

PERTURBED_ATTENTION, SKIPPED_BLOCKS = "perturbed attention", "skipped blocks"
KINDS = (PERTURBED_ATTENTION, SKIPPED_BLOCKS)
_ITEM = re.compile(r"(\d+)(?:\s*-\s*(\d+))?")


@dataclass(frozen=True)
class PerturbedGuidance:
    """Guidance away from a prediction with weakened blocks; defaults are those of diffusers' example for PixArt-Sigma.

    Equation 13 of arXiv:2403.17377 on top of CFG: guided + scale * (positive - weakened). Raises InputError.
    """

    blocks: str = "14"  # "14", or "3, 10-12"
    scale: float = 4.0
    kind: str = PERTURBED_ATTENTION
    start_percent: float = 0.0  # of sampling, 0 is its beginning
    end_percent: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"kind is {self.kind!r}; expected one of {', '.join(map(repr, KINDS))}.")
        if not 0 <= self.scale <= 100:
            raise InputError(f"scale is {self.scale!r}; expected 0 to 100, usually 2 to 5.")
        if not 0 <= self.start_percent < self.end_percent <= 1:
            raise InputError(
                f"start_percent is {self.start_percent!r} and end_percent {self.end_percent!r}; expected 0 to 1, "
                "the first below the second."
            )

    def active_at(self, timestep: float) -> bool:
        """Whether it changes anything at a timestep, 999 is the beginning."""
        return self.scale > 0 and (1 - self.end_percent) * LAST_TIMESTEP <= timestep <= (1 - self.start_percent) * LAST_TIMESTEP

    def wrappers(self, depth: int) -> dict[int, Callable[[BlockInputs, Callable[[BlockInputs], Tensor]], Tensor]]:
        """For `PixArtTransformer.forward`, of a model with `depth` blocks: what makes the weakened prediction."""
        weaken = _perturb if self.kind == PERTURBED_ATTENTION else _skip
        return dict.fromkeys(parse_blocks(self.blocks, depth), weaken)


def _perturb(inputs: BlockInputs, block: Callable[[BlockInputs], Tensor]) -> Tensor:
    return block(replace(inputs, identity_attention=True))


def _skip(inputs: BlockInputs, block: Callable[[BlockInputs], Tensor]) -> Tensor:
    return inputs.hidden


def parse_blocks(text: str, depth: int) -> frozenset[int]:
    """Block numbers in a list such as "14" or "3, 10-12". Raises InputError for others than 0 .. depth - 1."""
    found: set[int] = set()
    for item in filter(None, (part.strip() for part in text.split(","))):
        match = _ITEM.fullmatch(item)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last or last >= depth:
            raise InputError(
                f"blocks has {item!r}; expected numbers from 0 to {depth - 1}, the blocks of this model, or ranges of them: "
                f"{depth // 2}, or {depth // 3}-{depth // 2}."
            )
        found.update(range(first, last + 1))
    if not found:
        raise InputError(f"blocks is empty; expected numbers from 0 to {depth - 1}, such as {depth // 2}.")
    return frozenset(found)
