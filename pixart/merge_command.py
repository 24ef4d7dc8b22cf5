"""`python -m pixart merge`."""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .config import variant_names

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def add_merge_command(commands: argparse._SubParsersAction) -> None:
    """Adds it to the command line."""
    merge = commands.add_parser("merge", help="write a model with LoRAs in its weights")
    merge.add_argument("base", type=Path, help="the transformer that the LoRAs were trained on: file or folder")
    merge.add_argument("lora", type=Path, nargs="+", help="LoRA, LoHa, LoKr, DoRA, ... from any trainer: files or PEFT folders")
    merge.add_argument("--output", type=Path, required=True, help="a .safetensors or .pth; with --to diffusers a folder or .safetensors")
    merge.add_argument("--strength", type=float, nargs="+", default=[1.0], help="one for all LoRAs, or one each (default: 1)")
    merge.add_argument("--to", choices=("original", "diffusers"), default="original", help="names of the weights")
    merge.add_argument("--dtype", choices=tuple(DTYPES), help="default: as the transformer is stored; bf16 for fp8")
    merge.add_argument("--leave-text", action="store_true", help="leave out a LoRA's T5 layers, which this file can't hold")
    merge.add_argument("--variant", choices=("auto", *variant_names()), default="auto", help="the variant, if the weights can't tell")
    merge.add_argument("--ema", action="store_true", help="take state_dict_ema from an original .pth")
    merge.set_defaults(run=_merge)


def _merge(given: argparse.Namespace) -> None:
    import torch

    from .adapters.whole import merge_into_file

    dtype = getattr(torch, DTYPES[given.dtype]) if given.dtype else None
    written, lines = merge_into_file(
        given.base, given.lora, given.output, given.strength,
        to=given.to, dtype=dtype, variant=given.variant, ema=given.ema, leave_text=given.leave_text,
    )  # fmt: skip
    sys.stderr.write("".join(f"{line}\n" for line in lines))
    sys.stdout.write(f"{written}\n")
