"""Tells from keys and shapes which PixArt a state dict is, and says why."""
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from torch import Tensor

from ..config import HEAD_DIM, TransformerConfig, Variant, get_variant, variant_names
from ..errors import CheckpointError
from .hints import Hints
from .keys import NULL_CAPTION_KEY, POSITION_KEY
from .sizes import StoredPositions, main_dtype, read_sizes, read_stored_positions

AUTO = "auto"
CHANNELS = (4, 16)  # of latents whose VAE is known
TOKENS_OF_FAMILY = {variant.family: variant.max_tokens for variant in map(get_variant, variant_names())}
VAE_TITLES = {
    "sd1": "SD1 (scale 0.18215, e.g. sd-vae-ft-ema)",
    "sdxl": "SDXL (scale 0.13025)",
    "sd3": "SD3 (16 channels, scale 1.5305, shift 0.0609)",
    "flux": "Flux (16 channels, scale 0.3611, shift 0.1159: ae.safetensors)",
    "demo": "the demo's own (demo/weights/vae/pixart-demo-vae.safetensors)",
}


@dataclass(frozen=True)
class Detection:
    """What a file turned out to be; `reasons` says how each point was decided."""

    variant: str  # nearest zoo entry
    family: str  # "alpha" | "sigma"
    config: TransformerConfig
    base_size: int | None  # pixels; None where neither weights nor their surroundings tell
    max_tokens: int
    latent_scale: float
    vae: str  # "sd1" | "sdxl" | "sd3" | "flux" | "demo"
    dtype: str  # of most weights, e.g. "float16"
    parameters: int
    source: str
    container: str  # "safetensors", "pth", "diffusers folder", ...
    format: str  # key names: "original" | "diffusers"
    prefix: str
    ema: bool
    family_known: bool  # False: neither weights nor their surroundings tell, Sigma was assumed
    reasons: tuple[str, ...]
    latent_shift: float = 0.0

    def to_dict(self) -> dict:
        """Plain values, for JSON."""
        return asdict(self)

    def describe(self) -> str:
        """The report as text, one fact a line, reasons last."""
        c, variant = self.config, get_variant(self.variant)
        shape = "1 of {r}" if c.compression_mode == "uniform_every" else "{r}x{r}"
        compression = ", ".join(f"block {i}: {shape.format(r=r)}" for i, r in c.compressed_blocks) or "none"
        compression += f" ({c.compression_mode})" if c.compressed_blocks else ""
        base = f"{self.base_size} px" if self.base_size else f"unknown ({variant.base_size} px assumed)"
        facts = {
            "file": self.source,
            "model": f"{variant.title} ({self.variant})",
            "family": self.family + ("" if self.family_known else " (assumed)"),
            "base size": base,
            "caption tokens": self.max_tokens,
            "position range": f"{c.position_range:g}",
            "VAE": VAE_TITLES.get(self.vae, self.vae),
            "size conditioning": "yes" if c.micro_condition else "no",
            "KV compression": compression,
            "transformer": f"depth {c.depth}, hidden {c.hidden_size}, {c.num_heads} heads, "
            f"captions {c.caption_channels} wide, {c.in_channels} channels in, {c.out_channels} out",
            "weights": f"{self.parameters / 1e6:.1f}M parameters, {self.dtype}, {'EMA' if self.ema else 'not EMA'}",
            "format": f"{self.container}, {self.format} keys, prefix {self.prefix or 'none'}",
        }
        lines = [f"{name + ':':<19}{value}" for name, value in facts.items()]
        return "\n".join(lines + ["why:"] + [f"  - {reason}" for reason in self.reasons])


@dataclass(frozen=True)
class Origin:
    """Where a state dict came from, for the report and for messages."""

    source: str = "state dict"
    container: str = "state dict"
    format: str = "original"
    prefix: str = ""
    ema: bool = False
    notes: tuple[str, ...] = ()


def detect(
    state_dict: Mapping[str, Tensor], variant: str = AUTO, *, origin: Origin = Origin(), hints: Hints = Hints()
) -> Detection:
    """Reads a native state dict (only names, shapes and a stored `pos_embed`); raises CheckpointError.

    variant: "auto", or a zoo name for what weights can't reveal; one that contradicts them raises.
    """
    detection, problems = examine(state_dict, variant, origin=origin, hints=hints)
    if problems:
        raise CheckpointError(f"{origin.source}: the weights contradict what was given:\n  " + "\n  ".join(problems))
    return detection


def examine(
    state_dict: Mapping[str, Tensor], variant: str, *, origin: Origin, hints: Hints
) -> tuple[Detection, list[str]]:
    """The detection, and the contradictions that make it void."""
    shapes = {key: tuple(tensor.shape) for key, tensor in state_dict.items()}
    reasons = list(origin.notes)
    sizes = read_sizes(shapes, origin.source, reasons)
    rows = shapes[NULL_CAPTION_KEY][0] if len(shapes.get(NULL_CAPTION_KEY, ())) == 2 else None
    if sizes["in_channels"] not in CHANNELS:
        raise CheckpointError(
            f"{origin.source}: reads latents of {sizes['in_channels']} channels; expected {' or '.join(map(str, CHANNELS))}: those of the "
            "VAEs of SD1 and SDXL, or of SD3 and Flux. PixArt on another VAE isn't supported."
        )
    table = read_stored_positions(state_dict.get(POSITION_KEY), sizes["hidden_size"])
    problems = hints.contradictions(sizes)
    sizes["compressed_blocks"], mode = _compression(sizes, hints, reasons, problems)
    asked = variant != AUTO
    if not asked and hints.variant in variant_names():
        chosen, base, known = get_variant(hints.variant), hints.base_size, True
        reasons.append(f"{hints.noted_where or hints.where} says that it was saved as {chosen.name}.")
        problems += _contradictions(chosen, sizes, rows, reasons)
    elif not asked:
        chosen, base, known = _choose(sizes, rows, table, hints, reasons)
    else:
        chosen, base, known = get_variant(variant), get_variant(variant).base_size, True
        reasons.append(f"variant {variant}: family, size, VAE and positions are taken from it.")
        problems += _contradictions(chosen, sizes, rows, reasons)
    heads = _heads(sizes["hidden_size"], chosen, hints, reasons)
    if heads is None:
        problems.append(
            f"hidden size {sizes['hidden_size']} is not a multiple of {HEAD_DIM}: the number of heads is unknown; "
            "give the diffusers folder with its config.json"
        )
        heads = 1
    if sizes["hidden_size"] % 4:
        raise CheckpointError(f"{origin.source}: hidden size {sizes['hidden_size']}; expected a multiple of 4, in heads of {HEAD_DIM}.")
    position_range = _position_range(chosen, asked, hints, table, reasons)
    config = TransformerConfig(
        **sizes, num_heads=heads, max_tokens=rows or chosen.max_tokens, position_range=position_range, null_caption=rows is not None,
        compression_mode=mode,
    )  # fmt: skip
    detection = Detection(
        variant=chosen.name, family=chosen.family, config=config, base_size=base, max_tokens=config.max_tokens,
        latent_scale=chosen.latent_scale, vae=chosen.vae, dtype=main_dtype(t for key, t in state_dict.items() if key != POSITION_KEY),
        parameters=sum(math.prod(s) for key, s in shapes.items() if key != POSITION_KEY),
        source=origin.source, container=origin.container, format=origin.format, prefix=origin.prefix,
        ema=origin.ema, family_known=known, reasons=tuple(reasons), latent_shift=chosen.latent_shift,
    )  # fmt: skip
    return detection, problems


def _compression(sizes: dict, hints: Hints, reasons: list[str], problems: list[str]) -> tuple[tuple[tuple[int, int], ...], str]:
    """Compressed blocks and their mode. Weights show "conv"; the other modes have none, and must be told."""
    stored, told = sizes["compressed_blocks"], hints.compressed_blocks
    if not told:
        return stored, "conv"
    mode = hints.compression_mode or "conv"
    outside = [block for block, _ in told if block >= sizes["depth"]]
    if outside or (stored != told if mode == "conv" else bool(stored)):
        found = f"attn.sr in {len(stored)} blocks: {stored}" if stored else "no attn.sr"
        problems.append(f"{hints.where} says KV compression {mode}, {told}; the weights have {found} and {sizes['depth']} blocks")
        return stored, "conv"
    if mode != "conv":
        reasons.append(f"KV compression {mode} of {len(told)} block(s): from {hints.where}; it has no weights.")
    return told, mode


def _choose(
    sizes: dict, rows: int | None, table: StoredPositions | None, hints: Hints, reasons: list[str]
) -> tuple[Variant, int | None, bool]:
    """The zoo entry, the base size where something tells it, and whether the family is certain."""
    demo = get_variant("demo")
    if all(sizes[name] == getattr(demo.transformer, name) for name in sizes if name != "compressed_blocks"):
        reasons.append("the sizes are exactly those of this project's demo model.")
        return demo, demo.base_size, True
    if sizes["in_channels"] == 16:
        return *_choose_wide(table, hints, reasons), True
    family, known = _choose_family(sizes, rows, hints, reasons)
    if sizes["micro_condition"]:
        return get_variant("alpha-1024"), 1024, True
    base = _choose_base(table, hints, reasons)
    if family == "alpha":
        return *_choose_alpha(base, table, hints, reasons), known
    large = get_variant("sigma-900m")
    if sizes["depth"] == large.transformer.depth:
        reasons.append(f"depth {sizes['depth']}: the community's Sigma 900M.")
        return large, base or large.base_size, known
    released = [v for v in map(get_variant, variant_names()) if v.family == "sigma" and v.vae == "sdxl" and v.name != large.name]
    by_base = {v.base_size: v for v in released}
    if base is None:
        reasons.append(
            "the base size is not in the weights and every Sigma has the same layers: 1024 px is assumed (variant= changes that)."
        )
    return by_base.get(base or 1024, by_base[1024]), base, known


def _choose_wide(table: StoredPositions | None, hints: Hints, reasons: list[str]) -> tuple[Variant, int | None]:
    """PixArts of the community on a VAE of 16 channels: which of the two is told by the pipeline's VAE alone."""
    base = _choose_base(table, hints, reasons)
    if hints.vae in ("sd3", "flux"):
        reasons.append(f"latents of 16 channels; {hints.where} tells the VAE: {hints.vae}.")
        return get_variant(f"sigma-{hints.vae}"), base
    reasons.append(
        "latents of 16 channels, as of SD3's and Flux's VAE, which weights can't tell apart: SD3's is assumed; choose variant sigma-flux "
        "for Flux's."
    )
    return get_variant("sigma-sd3"), base


def _choose_family(sizes: dict, rows: int | None, hints: Hints, reasons: list[str]) -> tuple[str, bool]:
    if sizes["micro_condition"]:
        reasons.append("csize_embedder / ar_embedder are present: alpha-1024, conditioned on size and aspect ratio.")
        return "alpha", True
    for family, tokens in TOKENS_OF_FAMILY.items():
        if rows == tokens:
            reasons.append(f"y_embedding has {rows} rows: family {family}.")
            return family, True
    if hints.family:
        reasons.append(f"{hints.family_reason}: family {hints.family}.")
        return hints.family, True
    found = "y_embedding is absent" if rows is None else f"y_embedding has {rows} rows (alpha has 120, Sigma 300)"
    if hints.base_size == 256 and hints.position_range == 16:
        reasons.append(f"{found}; the config's 256 px with position range 16 occur only in alpha-256: family alpha.")
        return "alpha", True
    reasons.append(
        f"{found}: alpha and Sigma can't be told apart by the weights, Sigma is the default. "
        "If pictures look washed out or noisy choose an alpha variant."
    )
    return "sigma", False


def _choose_base(table: StoredPositions | None, hints: Hints, reasons: list[str]) -> int | None:
    if hints.base_size:
        reasons.append(f"base size {hints.base_size} px: from {hints.where}.")
        return hints.base_size
    if table is not None and table.side in (16, 32, 64, 128):
        reasons.append(
            f"the stored pos_embed has {table.side}x{table.side} rows: base size {table.side * 16} px "
            "(only a hint, some trainers store another size; its values are not used)."
        )
        return table.side * 16
    return None


def _choose_alpha(base: int | None, table: StoredPositions | None, hints: Hints, reasons: list[str]) -> tuple[Variant, int | None]:
    """alpha-256 differs in its position range, so a 256-row table alone is not enough."""
    configured = hints.base_size == 256
    stored = base == 256 and table is not None and table.span is not None and abs(table.span - 16) < 0.1
    if configured or stored:
        if stored and not configured:
            reasons.append("that pos_embed also counts positions to 16, as only alpha-256 does: alpha-256.")
        return get_variant("alpha-256"), 256
    if base == 256:
        reasons.append(
            "that pos_embed does not count to 16 as alpha-256's does: alpha-512 with range 32 is kept; variant=alpha-256 changes that."
        )
        base = None
    elif base is None:
        reasons.append("alpha-256 and alpha-512 have the same layers: alpha-512 is the default; variant=alpha-256 changes that.")
    return get_variant("alpha-512"), base


def _contradictions(chosen: Variant, sizes: dict, rows: int | None, reasons: list[str]) -> list[str]:
    """Points where the asked-for variant can't be what the weights are."""
    want, problems = chosen.transformer, []
    if want.micro_condition != sizes["micro_condition"]:
        has, needs = ("has", "has no size conditioning") if sizes["micro_condition"] else ("lacks", "needs them")
        problems.append(f"the file {has} csize_embedder / ar_embedder; {chosen.name} {needs}")
    family = next((f for f, tokens in TOKENS_OF_FAMILY.items() if tokens == rows), None)
    if family and family != chosen.family and not sizes["micro_condition"]:
        problems.append(f"y_embedding has {rows} rows, that is {family}; {chosen.name} has {chosen.max_tokens}")
    same_width = sizes["hidden_size"] == want.hidden_size
    full_depths = {v.transformer.depth for v in map(get_variant, variant_names()) if v.transformer.hidden_size == want.hidden_size}
    if sizes["depth"] != want.depth and same_width and sizes["depth"] in full_depths:
        problems.append(f"the file has {sizes['depth']} blocks; {chosen.name} has {want.depth}")
    if chosen.name == "demo" and (not same_width or sizes["caption_channels"] != want.caption_channels):
        problems.append(
            f"hidden size {sizes['hidden_size']} and captions {sizes['caption_channels']} wide; "
            f"the demo has {want.hidden_size} and {want.caption_channels}"
        )
    if sizes["in_channels"] != want.in_channels:
        problems.append(f"the file reads latents of {sizes['in_channels']} channels; {chosen.name} has {want.in_channels}")
    for name in ("hidden_size", "depth", "caption_channels", "out_channels"):
        if sizes[name] != getattr(want, name):
            reasons.append(f"{name} is {sizes[name]}, not the {getattr(want, name)} of {chosen.name}: the weights' value is used.")
    return [f"{problem}. Choose another variant, or auto." for problem in problems]


def _heads(hidden: int, chosen: Variant, hints: Hints, reasons: list[str]) -> int | None:
    if hints.num_heads:
        reasons.append(f"{hints.num_heads} heads: read from {hints.where}.")
        return hints.num_heads
    if hidden == chosen.transformer.hidden_size:
        return chosen.transformer.num_heads
    if hidden % HEAD_DIM:
        return None
    reasons.append(f"{hidden // HEAD_DIM} heads: hidden size {hidden} in heads of {HEAD_DIM}, as in every PixArt.")
    return hidden // HEAD_DIM


def _position_range(chosen: Variant, explicit: bool, hints: Hints, table: StoredPositions | None, reasons: list[str]) -> float:
    result = chosen.transformer.position_range
    if hints.position_range and abs(hints.position_range - result) > 1e-6:
        if explicit:
            reasons.append(f"position range {result:g} of {chosen.name}; the config's {hints.position_range:g} is overruled.")
        else:
            reasons.append(
                f"position range {hints.position_range:g}: from {hints.where} "
                f"({chosen.name} has {result:g}; variant={chosen.name} uses that)."
            )
            result = hints.position_range
    else:
        reasons.append(f"position range {result:g}: {chosen.name}'s.")
    if table is not None and table.span is not None and abs(table.span - result) > 0.1:
        reasons.append(f"the stored pos_embed counts to {table.span:.3g} instead; it is ignored.")
    return result
