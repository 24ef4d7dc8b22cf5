"""Training-free compression of self-attention's keys and values: an approximation, for weights trained without it.

PixArt-Sigma (section 3.2) trains models whose keys and values are merged over R x R tokens. Here the tokens of any PixArt
are merged, by their mean or by keeping one of each cell; queries stay, so the picture keeps its tokens, and attention
costs R² times less. No weights are added or changed.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import TransformerConfig
from .errors import InputError
from .timesteps import LAST_TIMESTEP

METHODS = ("mean", "stride")
MAX_RATIO = 8
NUMBERS = tuple(range(MAX_RATIO + 1))  # by its place here, a ratio that changes between steps stays a number to torch.compile, no symbol


@dataclass(frozen=True)
class KVCompression:
    """What to compress, and when; several with different blocks go together. Raises InputError for impossible values.

    The defaults are what keeps most of the demo's pictures at the same cost (benchmarks/results/kv_quality.md): means, and the
    first half of sampling, where composition is found; details need every key. end_percent=1 is fastest.
    """

    ratio: int = 2  # of a cell's side, in tokens
    method: str = "mean"  # "mean" of a cell's tokens, or "stride": its first
    first_block: int = 0
    last_block: int = -1  # inclusive; -1 is the model's last
    start_percent: float = 0.0  # of sampling, 0 is its beginning; as the host's nodes count it
    end_percent: float = 0.5
    min_tokens: int = 0  # smaller pictures are left alone; a token is 16 x 16 pixels
    key_scale: float = 1.0  # of merged keys; above 1 sharpens the attention that means have flattened
    keep_length: bool = False  # stretches each mean key, per head, to the mean length of the keys it stands for
    size_bias: bool = True  # cells cut by the picture's edge weigh as many tokens as they hold

    def __post_init__(self) -> None:
        for name in ("ratio", "first_block", "last_block", "min_tokens"):
            value = getattr(self, name)
            _expect(name, value, isinstance(value, Integral) and not isinstance(value, bool), "a whole number")
            object.__setattr__(self, name, int(value))  # numpy's too
        for name in ("start_percent", "end_percent", "key_scale"):
            value = getattr(self, name)
            _expect(name, value, isinstance(value, Real) and not isinstance(value, bool), "a number")
            object.__setattr__(self, name, float(value))
        _expect("ratio", self.ratio, 2 <= self.ratio <= MAX_RATIO, f"2 to {MAX_RATIO}, usually 2 or 4")
        _expect("method", self.method, self.method in METHODS, f"one of {', '.join(METHODS)}")
        _expect("min_tokens", self.min_tokens, self.min_tokens >= 0, "0 or more")
        _expect("key_scale", self.key_scale, 0 < self.key_scale < 100, "above 0, usually 1")
        _expect("start_percent", self.start_percent, 0 <= self.start_percent < 1, "0 to below 1")
        _expect("end_percent", self.end_percent, 0 <= self.end_percent <= 1, "0 to 1")
        wanted = f"more than start_percent {self.start_percent:g}, up to 1"
        _expect("end_percent", self.end_percent, self.start_percent < self.end_percent, wanted)

    def blocks(self, depth: int) -> range:
        """The blocks of a model with `depth` of them; raises InputError where there are none of these numbers."""
        last = depth - 1 if self.last_block == -1 else self.last_block
        if not 0 <= self.first_block <= last < depth:  # texts are made only then: torch.compile comes by here
            self._raise_outside(depth)
        return range(self.first_block, last + 1)

    def _raise_outside(self, depth: int) -> None:
        has = f"this model has blocks 0 to {depth - 1}"
        _expect("first_block", self.first_block, 0 <= self.first_block < depth, f"0 to {depth - 1}: {has}")
        _expect("last_block", self.last_block, False, f"{self.first_block} (first_block) to {depth - 1}, or -1 for the last: {has}")

    @property
    def always(self) -> bool:
        """Whether it holds for all of sampling."""
        return self.start_percent == 0 and self.end_percent == 1

    def active_at(self, timestep: float) -> bool:
        """Whether it holds at a timestep (999 is the beginning): from start_percent on, before end_percent."""
        begun = timestep <= (1 - self.start_percent) * LAST_TIMESTEP or self.start_percent == 0
        return begun and (timestep > (1 - self.end_percent) * LAST_TIMESTEP or self.end_percent == 1)


def listed(wanted: KVCompression | Sequence[KVCompression] | None) -> tuple[KVCompression, ...]:
    """One, several or none as a tuple; raises InputError for anything else."""
    if isinstance(wanted, KVCompression):
        return (wanted,)
    given = () if wanted is None else wanted
    if not isinstance(given, (tuple, list)) or not all(isinstance(one, KVCompression) for one in given):
        raise InputError(f"kv_compression is {wanted!r}; expected a KVCompression, like KVCompression(ratio=2), or a list of them.")
    return tuple(given)


def check_together(wanted: Sequence[KVCompression], config: TransformerConfig) -> None:
    """Raises InputError where a block would be compressed twice at the same time, or is not in the model."""
    trained = dict(config.compressed_blocks)
    for number, one in enumerate(wanted):
        blocks = one.blocks(config.depth)
        twice = [i for i in blocks if i in trained]
        if twice:
            free = [i for i in range(config.depth) if i not in trained]
            raise InputError(
                f"block(s) {_ranges(twice)} of {_ranges(blocks)} are compressed already: the model was trained so. "
                + (f"Expected blocks among {_ranges(free)}." if free else "It has no other blocks; leave the node out.")
            )
        for other in wanted[:number]:
            shared = sorted(set(blocks) & set(other.blocks(config.depth)))
            if shared and one.start_percent < other.end_percent and other.start_percent < one.end_percent:
                raise InputError(
                    f"block(s) {_ranges(shared)} are compressed already (by {other.ratio}, from {other.start_percent:g} to "
                    f"{other.end_percent:g} of sampling); expected other blocks than {_ranges(other.blocks(config.depth))}, or "
                    "another part of sampling."
                )


def plan_blocks(wanted: Sequence[KVCompression], config: TransformerConfig, tokens: int) -> dict[int, KVCompression]:
    """Block -> its compression, of those that hold now, for a picture of so many tokens; raises InputError."""
    plan: dict[int, KVCompression] = {}
    trained = dict(config.compressed_blocks)
    for one in wanted:
        for index in one.blocks(config.depth):
            if index in plan or index in trained:
                raise InputError(f"block {index} is compressed already; expected each block once, and none that was trained so.")
            plan[index] = one
    return {index: one for index, one in plan.items() if tokens >= one.min_tokens}


def compress_keys_values(
    k: Tensor, v: Tensor, grid: tuple[int, int], heads: int, how: KVCompression
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Merged keys and values, and what to add to their scores, if anything.

    k, v: (B, rows*columns, D) -> (B, cells, D) each, and (B, cells) in k's dtype or None. Cells at the edge
    of a grid that the ratio doesn't divide are smaller; no token is dropped.
    """
    ratio = NUMBERS[how.ratio]
    if how.method == "mean":
        keys, values = _mean(k, grid, ratio), _mean(v, grid, ratio)
        if how.keep_length:
            keys = keys * _lost_length(k, keys, grid, heads, ratio)
    else:
        keys, values = (x.unflatten(1, grid)[:, ::ratio, ::ratio].flatten(1, 2) for x in (k, v))
    if how.key_scale != 1:
        keys = keys * how.key_scale
    ragged = any(side % ratio for side in grid)
    return keys, values, _size_bias(keys, grid, ratio) if ragged and how.size_bias else None


def _mean(tokens: Tensor, grid: tuple[int, int], ratio: int) -> Tensor:
    """(B, N, D) -> (B, cells, D); a cell over the edge is divided by the tokens it really holds."""
    image = tokens.unflatten(1, grid).movedim(-1, 1)  # (B, D, rows, columns)
    return F.avg_pool2d(image, ratio, ceil_mode=True).flatten(2).transpose(1, 2)


def _lost_length(k: Tensor, merged: Tensor, grid: tuple[int, int], heads: int, ratio: int) -> Tensor:
    """Factor of each merged key, (B, cells, D): mean length of its keys over its own, per head, at most the ratio."""
    width = k.shape[-1] // heads
    lengths = _mean(k.unflatten(-1, (heads, width)).float().norm(dim=-1), grid, ratio)  # (B, cells, heads)
    own = merged.unflatten(-1, (heads, width)).float().norm(dim=-1)
    # The mean of n unrelated keys is sqrt(n) = ratio times shorter; more would be stretching noise.
    return (lengths / own.clamp_min(1e-6)).clamp(max=ratio).to(k.dtype).repeat_interleave(width, dim=-1)


def _size_bias(keys: Tensor, grid: tuple[int, int], ratio: int) -> Tensor:
    """log(tokens of a cell / tokens of a whole cell), (B, cells): n equal keys weigh as one key with log n added."""
    rows, columns = (
        (side - ratio * torch.arange(-(-side // ratio), device=keys.device)).clamp(max=ratio) / ratio for side in grid
    )
    return (rows[:, None] * columns).log().flatten().to(keys.dtype).expand(keys.shape[0], -1)


def _expect(name: str, value: object, fits: bool, wanted: str) -> None:
    if not fits:
        raise InputError(f"{name} is {value!r}; expected {wanted}.")


def _ranges(numbers: Sequence[int]) -> str:
    """Block numbers in short: "0-3, 7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
