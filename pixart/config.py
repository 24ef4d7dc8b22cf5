"""Hyper-parameters of the transformer, and the zoo of variants in `configs/*.json`."""
from __future__ import annotations

import json
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import cache
from pathlib import Path

from .errors import ConfigError

_PACKAGE = Path(__file__).resolve().parent
# pip puts the configs inside the package; in the repository they lie beside it
CONFIG_DIR = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"
HEAD_DIM = 72  # every PixArt of the zoo; the head count can't be read from the weights


COMPRESSION_MODES = ("conv", "uniform", "uniform_every", "ave")  # of trained KV compression, as the reference names them


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of one PixArt transformer. The defaults are XL/2 of Sigma."""

    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    patch_size: int = 2
    in_channels: int = 4
    out_channels: int = 8  # noise and, in the second half, the variance's interpolation weight
    mlp_hidden: int = 4608
    caption_channels: int = 4096
    max_tokens: int = 300  # rows of `y_embedder.y_embedding`
    position_range: float = 32.0  # positions run from 0 to this, at every size
    micro_condition: bool = False  # alpha-1024: size and aspect ratio join the timestep
    null_caption: bool = True  # whether `y_embedder.y_embedding` is in the weights
    compressed_blocks: tuple[tuple[int, int], ...] = field(default=())  # (block, ratio) of trained KV compression
    compression_mode: str = "conv"  # of all these blocks; only "conv" has weights of its own
    qk_norm: bool = False  # LayerNorm over queries and keys of self-attention, an option of the reference's training code

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}: "
                f"PixArt heads are {HEAD_DIM} wide, so expected {self.hidden_size // HEAD_DIM or 1} heads."
            )
        if self.hidden_size % 4:
            raise ConfigError(f"hidden_size {self.hidden_size} must be a multiple of 4 for 2-D sine positions.")
        if self.compression_mode not in COMPRESSION_MODES:
            raise ConfigError(f"compression_mode is {self.compression_mode!r}; expected one of {', '.join(COMPRESSION_MODES)}.")
        blocks = [block for block, _ in self.compressed_blocks]
        wrong = [pair for pair in self.compressed_blocks if not 0 <= pair[0] < self.depth or pair[1] < 2]
        if wrong or len(set(blocks)) < len(blocks):
            raise ConfigError(
                f"compressed_blocks are {self.compressed_blocks}; expected pairs (block, ratio) with each block, "
                f"0 to {self.depth - 1}, at most once, and ratios of 2 or more."
            )

    def to_dict(self) -> dict:
        """Plain values, as they stand in `configs/*.json`."""
        return asdict(self)


@dataclass(frozen=True)
class Variant:
    """One released model: what its weights can't tell, and where they come from."""

    name: str
    title: str
    family: str  # "alpha" | "sigma"
    base_size: int  # pixels; the bins of this size were trained
    max_tokens: int
    latent_scale: float  # model latent = (VAE latent - latent_shift) x this
    vae: str  # "sd1" | "sdxl" | "sd3" | "flux" | "demo"
    transformer: TransformerConfig
    files: tuple[str, ...] = ()
    note: str = ""
    latent_shift: float = 0.0


def from_fields(kind: type, values: dict, source: str):
    """Builds a dataclass, refusing unknown and missing fields by name."""
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: found {values!r}; expected an object with some of {sorted(f.name for f in fields(kind))}.")
    known = {f.name for f in fields(kind)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ConfigError(f"{source}: unknown field(s) {unknown}; expected some of {sorted(known)}.")
    missing = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING and f.name not in values]
    if missing:
        raise ConfigError(f"{source}: field(s) {missing} are missing; add them.")
    return kind(**values)


@cache
def get_variant(name: str) -> Variant:
    """The variant called `name`; raises ConfigError with the list of names if there is none."""
    path = CONFIG_DIR / f"{name}.json"
    if name not in variant_names():
        raise ConfigError(f"Unknown PixArt variant {name!r}; expected one of {', '.join(variant_names())}.")
    values = json.loads(path.read_text(encoding="utf-8"))
    sizes = values.pop("transformer", {})
    if "compressed_blocks" in sizes:
        sizes["compressed_blocks"] = tuple(tuple(pair) for pair in sizes["compressed_blocks"])
    values["transformer"] = from_fields(TransformerConfig, sizes, f"{path.name}, transformer")
    values["files"] = tuple(values.get("files", ()))
    variant = from_fields(Variant, values, path.name)
    if variant.name != name:
        raise ConfigError(f"{path.name} names its variant {variant.name!r}; expected {name!r}.")
    return variant


@cache
def variant_names() -> tuple[str, ...]:
    """Names of the zoo, in the order users meet them."""
    return tuple(json.loads((CONFIG_DIR / "zoo.json").read_text(encoding="utf-8"))["variants"])
