"""Our transformer beside diffusers' own, on the same random weights and inputs, in fp32.

`python -m tests.support.fidelity [variant ...]` measures every bin of every zoo entry (a sample of the
2K ones) and writes `benchmarks/results/fidelity.json`; it goes on where an earlier run stopped.
"""
from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixart.bins import bin_table
from pixart.checkpoints import load_transformer
from pixart.config import Variant, get_variant, variant_names
from pixart.model import PixArtTransformer
from tests.support.checkpoint_factory import diffusers_config, original_keys, reference_model, write

HIDDEN = 1152
LIMIT = 1e-5  # relative error in fp32
BATCH = 3
TOKENS = 64  # of the longest caption in a batch
RESULT = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "fidelity.json"
# The released sizes; PixArts on 16 channels have them too, and tests of their own
FULL_SIZE = tuple(name for name in variant_names() if name != "demo" and get_variant(name).transformer.in_channels == 4)


@dataclass(frozen=True)
class Case:
    """One zoo entry with random weights: diffusers' model, and its tensors in both layouts."""

    variant: Variant
    config: dict[str, Any]
    reference: torch.nn.Module
    diffusers: dict[str, Tensor]
    original: dict[str, Tensor]


@lru_cache(maxsize=2)
def make_case(name: str, depth: int = 1, hidden: int | None = None) -> Case:
    """Random weights of a zoo entry's width, or of another, with fewer blocks."""
    variant = get_variant(name)
    sizes = variant.transformer
    config = diffusers_config(
        hidden=hidden or sizes.hidden_size, depth=depth, captions=sizes.caption_channels, pixels=variant.base_size,
        position_range=sizes.position_range, micro=sizes.micro_condition, channels=sizes.in_channels,
    )  # fmt: skip
    reference = reference_model(config)
    tensors = reference.state_dict()
    return Case(variant, config, reference, tensors, original_keys(tensors, depth, variant.max_tokens))


def bins_of(name: str) -> list[tuple[int, int]]:
    """All (height, width) of a zoo entry's base size, tallest last."""
    return list(bin_table(get_variant(name).base_size).values())


def spread(items: list, count: int) -> list:
    """`count` items evenly over a list, both ends among them."""
    if count >= len(items):
        return items
    return [items[len(items) // 2]] if count == 1 else [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def sweep_count(name: str) -> int:
    """Bins of the sweep: all; 5 above 1024 px, where one takes minutes."""
    return 5 if get_variant(name).base_size > 1024 else 40


def make_inputs(case: Case, height: int, width: int, batch: int = BATCH) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latent, timestep, context and mask for a size in pixels, with captions of unequal length."""
    generator = torch.Generator().manual_seed(height * 31 + width)
    latent = torch.randn(batch, case.config["in_channels"], height // 8, width // 8, generator=generator)
    context = torch.randn(batch, TOKENS, case.config["caption_channels"], generator=generator)
    lengths = torch.tensor([TOKENS, 37, 1][:batch] if batch > 1 else [37])
    mask = torch.arange(TOKENS)[None] < lengths[:, None]
    return latent, torch.tensor([999, 400, 3][:batch]), context, mask


def expected_output(case: Case, height: int, width: int, batch: int = BATCH) -> Tensor:
    """What diffusers' model makes of `make_inputs`."""
    latent, timestep, context, mask = make_inputs(case, height, width, batch)
    added = {"resolution": None, "aspect_ratio": None}
    if case.config["use_additional_conditions"]:
        added = {
            "resolution": torch.tensor([[height, width]] * batch, dtype=torch.float32),
            "aspect_ratio": torch.tensor([[height / width]] * batch, dtype=torch.float32),
        }
    with torch.inference_mode():
        return case.reference(
            latent, encoder_hidden_states=context, timestep=timestep, encoder_attention_mask=mask.float(),
            added_cond_kwargs=added, return_dict=False,
        )[0]  # fmt: skip


def relative_error(
    case: Case, model: PixArtTransformer, height: int, width: int, batch: int = BATCH, expected: Tensor | None = None
) -> float:
    """||ours - diffusers|| / ||diffusers|| at a size in pixels."""
    if expected is None:
        expected = expected_output(case, height, width, batch)
    latent, timestep, context, mask = make_inputs(case, height, width, batch)
    with torch.inference_mode():
        found = model(latent, timestep.float(), context, mask)
    return float((found - expected).norm() / expected.norm())


def load_through(case: Case, kind: str, folder: Path, variant: str) -> PixArtTransformer:
    """Writes the weights in a format and loads them back."""
    path = write(kind, folder, case.config, case.diffusers, case.original)
    return load_transformer(path, variant=variant, ema=kind == "pth-ema")


def in_memory(case: Case) -> PixArtTransformer:
    """Our model with the case's weights, without a file."""
    heads, head_size = case.config["num_attention_heads"], case.config["attention_head_dim"]
    width = heads * head_size
    config = replace(
        case.variant.transformer, depth=case.config["num_layers"], hidden_size=width, num_heads=heads, mlp_hidden=4 * width
    )
    model = PixArtTransformer(config, device="meta")
    model.load_state_dict(case.original, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def main() -> None:
    """Measures bin by bin and saves after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("variants", nargs="*", default=FULL_SIZE)
    parser.add_argument("--bins", type=int, help="measure only so many bins of each (default: all; 5 of 2K)")
    options = parser.parse_args()
    result = json.loads(RESULT.read_text()) if RESULT.is_file() else {"errors": {}}
    result |= {"limit": LIMIT, "batch": BATCH, "hidden": HIDDEN, "blocks": 1, "dtype": "float32", "torch": torch.__version__,
               "machine": f"{platform.machine()}, {torch.get_num_threads()} threads"}  # fmt: skip
    for name in options.variants:
        case = make_case(name)
        model = in_memory(case)
        bins = spread(bins_of(name), options.bins or sweep_count(name))
        errors = result["errors"].setdefault(name, {})
        for height, width in bins:
            if f"{height}x{width}" in errors:
                continue
            start = time.perf_counter()
            errors[f"{height}x{width}"] = error = relative_error(case, model, height, width)
            result["worst"] = max(max(e.values(), default=0.0) for e in result["errors"].values())
            RESULT.parent.mkdir(parents=True, exist_ok=True)
            RESULT.write_text(json.dumps(result, indent=1) + "\n")
            print(f"{name} {height}x{width}: {error:.2e} in {time.perf_counter() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
