"""`python -m pixart generate --prompts`: the options of the command line, made into stages."""
from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, PixArtError
from .where import add_where_options, where

if TYPE_CHECKING:
    from .graph import Graph

COMFY, AUTO = "comfy", "auto"
BATCH = 4
NOT_FOR_COMFY = {  # options that its hosts don't heed, and what they are where nobody gives them
    "workers": None, "address": None, "batch_size": BATCH, "ema": False, "tokenizer": None, "dtype": None, "t5_precision": None,
    "clean_caption": False,
}  # fmt: skip


def add_many_options(parser: argparse.ArgumentParser) -> None:
    """What `generate` has for many prompts."""
    group = parser.add_argument_group("many prompts")
    group.add_argument(
        "--prompts", type=Path, metavar="FILE",
        help="instead of --prompt: text with one per line, or csv or jsonl with prompt, negative, seed, width, height, steps, guidance, "
        "images. --output is a folder then; run the command again to resume. The options fill in what a row leaves out. "
        "T5 states are kept in the folder's .pixart-work (T5-XXL: about 0.5 MB per prompt)",
    )  # fmt: skip
    group.add_argument("--batch-size", type=int, default=BATCH, help=f"pictures drawn together (default: {BATCH})")
    group.add_argument("--overwrite", action="store_true", help="replace pictures that other prompts or settings drew into the folder")
    group.add_argument("--hosts", nargs="+", metavar="HOST", help="for --on comfy: running ComfyUIs with this pack, e.g. 10.0.0.5:8188")
    group.add_argument("--graph", type=Path, help="for --on comfy: a workflow in API format, instead of the plain one")
    add_where_options(parser, COMFY)


def run_many(given: argparse.Namespace, parts: dict[str, Path], dtype: str | None) -> None:
    """Draws all pictures of --prompts; says on standard output what came of them. Raises PixArtError and OSError."""
    from .many import generate_many, summary
    from .where import leads

    if given.batch_size < 1:
        raise InputError(f"--batch-size is {given.batch_size}; expected at least 1.")
    if given.on != COMFY and (given.hosts or given.graph):
        raise InputError(f"--hosts and --graph are for --on comfy, but --on is {given.on}.")
    if given.on == COMFY:
        from .on_comfy import generate_on_comfy, load_graph

        others = [f"--{name.replace('_', '-')}" for name, usual in NOT_FOR_COMFY.items() if getattr(given, name) != usual]
        if others:
            raise InputError(
                f"{', '.join(others)}: not for --on comfy, whose hosts draw by their nodes' settings. Leave it out, or set it in a "
                "workflow of your own and give that by --graph."
            )
        graph = load_graph(given.graph) if given.graph else None
        encode, draw = make_stages(given, parts, dtype, batch=1, graph=graph)
        rows = generate_on_comfy(draw, given.hosts or (), graph, given.overwrite)
    else:
        chosen = where(given)
        encode, draw = make_stages(given, parts, dtype, given.batch_size)
        rows = generate_many(encode, draw, chosen, given.overwrite)
    if not leads():
        return
    sys.stdout.write(summary(rows, draw.place, encode) + "\n")
    failed = sum(row["status"] != "drawn" for row in rows)
    if failed:
        raise PixArtError(f"{failed} of {len(rows)} pictures failed. Run the command again to try them once more.")


def make_stages(given: argparse.Namespace, parts: dict[str, Path], dtype: str | None, batch: int, graph: Graph | None = None) -> tuple:
    """EncodeStage and DrawStage of the command line; checks the prompts file and the model first. graph: one's own, for ComfyUI."""
    from ..samplers import find_sampler
    from ..training.data.marks import mark_of
    from .draw_stage import DrawSettings, DrawStage
    from .encode_stage import EncodeStage, TextSettings
    from .graph import GraphModels, model_name
    from .prompt_rows import LARGEST_SEED, Defaults, read_pictures
    from .stage import identity

    model = _model(given, parts["transformer"])
    base = model["base_size"]
    size = {"width": base if given.width is None else given.width, "height": base if given.height is None else given.height}
    sampler = find_sampler(given.sampler)
    steps = sampler.steps if given.steps is None else given.steps
    guidance = sampler.guidance if given.cfg is None else given.cfg
    if not 0 <= (given.seed or 0) <= LARGEST_SEED:
        raise InputError(f"--seed is {given.seed}; expected 0 to {LARGEST_SEED}.")
    defaults = Defaults(given.negative, given.seed or 0, steps=steps, guidance=guidance, images=given.images, **size)
    pictures = read_pictures(given.prompts, defaults)
    for count in sorted({item.steps for item in pictures}):
        sampler.check(count, sampler.guidance)  # before T5 has read all prompts
    prompts = {item.prompt for item in pictures} | {item.negative for item in pictures if item.guided}
    output = given.output or Path("pictures")
    text = TextSettings.of(
        parts["text_encoder"], given.tokenizer, precision=given.t5_precision, dtype=dtype, max_tokens=model["max_tokens"],
        clean_caption=given.clean_caption,
    )  # fmt: skip
    encode = EncodeStage(output, text, prompts)
    names = {name: model_name(path) for name, path in parts.items()}
    settings = DrawSettings(
        transformer=parts["transformer"].absolute(), vae=parts["vae"].absolute(), variant=given.variant, ema=given.ema, dtype=dtype,
        sampler=given.sampler, schedule=given.schedule, batch=batch, own_graph=mark_of(graph) if graph else "",
        weights="-".join(identity(parts[name]) or names[name] for name in ("transformer", "vae")),
        graph=GraphModels(**names, **model, use_bins=not given.no_bins),
    )  # fmt: skip
    return encode, DrawStage(encode, settings, pictures)


def _model(given: argparse.Namespace, path: Path) -> dict[str, Any]:
    """variant, base_size and max_tokens of a transformer; of one that lies only on ComfyUI's machines, --variant tells."""
    from ..checkpoints import inspect_file
    from ..config import get_variant

    if given.on == COMFY and not path.exists():
        if given.variant == AUTO:
            raise InputError(f"{path} is not on this machine; say with --variant what it is, so that sizes and token limits are right.")
        known = get_variant(given.variant)
        return {"variant": known.name, "base_size": known.base_size, "max_tokens": known.max_tokens}
    found = inspect_file(path, variant=given.variant, ema=given.ema)
    base = found.base_size or get_variant(found.variant).base_size
    return {"variant": found.variant, "base_size": base, "max_tokens": found.max_tokens}
