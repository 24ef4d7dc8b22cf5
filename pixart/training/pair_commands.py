"""`python -m pixart pairs`: what the teacher's solver makes of noise, for DMD's regression."""
from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .recipe import Recipe

PAIRS = """Draws noise and the pictures that a recipe's first weights make of it, for DMD with regression (objective.pairs).

Captions and sizes come from the recipe's source. OUT gets one file per batch. The same command resumes a stopped run. On several
GPUs: torchrun --nproc-per-node 8 -m pixart pairs ...
"""
DRAWS_STAGE = 2**31 - 3  # no stage of a recipe has this number: training draws other pictures


def add_pair_commands(commands: Any) -> None:
    """Adds it to a parser's subcommands."""
    raw = argparse.RawDescriptionHelpFormatter
    pairs = commands.add_parser("pairs", help="draw pairs of noise and picture for DMD", description=PAIRS, formatter_class=raw)
    pairs.add_argument("recipe", type=Path, help="recipe of the DMD run, e.g. configs/train/demo-dmd.json")
    pairs.add_argument("out", type=Path, help="folder for the pairs")
    pairs.add_argument("--count", type=int, required=True, help="how many pairs to end up with; PixArt-DMD was made with 640,000")
    pairs.add_argument("--steps", type=int, default=20, help="of DPM-Solver++")
    pairs.add_argument("--cfg", type=float, default=4.5, help="guidance of the teacher")
    pairs.add_argument("--batch-size", type=int, default=16, help="pairs per file")
    pairs.add_argument("--seed", type=int, default=0)
    pairs.add_argument("--data", help="as for train")
    pairs.add_argument("--transformer", help="the teacher, as for train")
    pairs.add_argument("--text-encoder", help="as for train")
    pairs.add_argument("--vae", help="as for train")
    pairs.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", dest="changes", help="as for train")
    pairs.set_defaults(run=_pairs, output=None)


def _pairs(given: argparse.Namespace) -> None:
    from ..errors import InputError
    from .commands import changes_of
    from .diffusion import STEPS
    from .draw_pairs import draw_pairs
    from .recipe import load_recipe

    for name, least in (("count", 1), ("steps", 1), ("cfg", 1), ("batch_size", 1)):
        if not getattr(given, name) >= least:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(given, name)}; expected {least} or more.")
    if given.steps > STEPS:
        raise InputError(f"--steps is {given.steps}; expected at most {STEPS}.")
    recipe: Recipe = load_recipe(given.recipe, changes_of(given))
    written = draw_pairs(recipe, given.out, given.count, given.steps, given.cfg, given.batch_size, given.seed)
    sys.stdout.write(f"{written} files of pairs in {given.out}\n")
