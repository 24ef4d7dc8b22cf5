"""The subcommands `train` and `score`."""
from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from .data.commands import add_places, place_changes

TRAIN = """Trains by a recipe (configs/train/*.json), and resumes a stopped run.

Pictures, weights and output are given on the command line. --set changes any other field of the recipe.
Stop with Ctrl-C and resume with the same command. On several GPUs: torchrun --nproc-per-node 8 -m pixart train ...
"""
SCORE = """Scores pictures: FID against a folder of real ones (--reference), CLIP score with their captions (NAME.txt beside each)."""


def add_training_commands(commands: Any) -> None:
    """Adds them to a parser's subcommands."""
    raw = argparse.RawDescriptionHelpFormatter
    says = "train a model by a recipe, or resume a stopped run"
    train = commands.add_parser("train", help=says, description=TRAIN, formatter_class=raw)
    train.add_argument("recipe", type=Path, help="a recipe, e.g. configs/train/demo.json")
    add_places(train)
    train.add_argument("--transformer", metavar="PLACE", help="weights to start from: a file or folder, in any format that loads")
    where = "where the weights go; states, log and samples go beside it, to NAME-run, unless the recipe sets run_dir"
    train.add_argument("--output", metavar="FILE", help=where)
    train.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", dest="changes",
        help="change one field of the recipe, e.g. seed=1 or stages.0.steps=500; may be repeated",
    )  # fmt: skip
    train.add_argument("--dry-run", action="store_true", help="only say what would happen and how much memory it takes")
    train.add_argument("--overwrite", action="store_true", help="start over, replacing an earlier run and its output")
    train.add_argument("--accept-changes", action="store_true", help="resume even if recipe, base or pictures have changed since")
    train.add_argument("--stop-after", type=_seconds, metavar="SECONDS", help="save and stop after this long")
    train.set_defaults(run=_train)

    score = commands.add_parser("score", help="FID and CLIP score of pictures", description=SCORE, formatter_class=raw)
    score.add_argument("pictures", type=Path, help="a folder of pictures")
    score.add_argument("--reference", type=Path, help="a folder of real pictures, for FID")
    score.add_argument("--inception", type=Path, metavar="FILE", help="torch-fidelity's weights-inception file (default: it is downloaded)")
    score.add_argument("--clip", metavar="MODEL", help="a CLIP by name or folder, for the CLIP score, e.g. openai/clip-vit-large-patch14")
    score.add_argument("--batch-size", type=int, default=16)
    score.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ...")
    score.add_argument("--json", action="store_true", help="print the result as JSON")
    score.set_defaults(run=_score)


def changes_of(given: argparse.Namespace) -> list[str]:
    """Changes of the recipe, the places that have a flag among them; what --set says of a place is overruled by its flag."""
    fields = {"initialize": given.transformer, "output": given.output}
    own = [f"{field}={json.dumps(value)}" for field, value in fields.items() if value is not None]
    return [*given.changes, *place_changes(given), *own]


def _seconds(text: str) -> float:
    """Of --stop-after."""
    with suppress(ValueError):
        if float(text) >= 0:  # not NaN
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r}; expected seconds, 0 or more")


def _train(given: argparse.Namespace) -> None:
    from .run import dry_run, train

    options = {"overwrite": given.overwrite, "accept_changes": given.accept_changes}
    if given.dry_run:
        for line in dry_run(given.recipe, changes_of(given), **options):
            _say(line)
        return
    _say(str(train(given.recipe, changes_of(given), **options, stop_after=given.stop_after)))


def _say(line: str) -> None:
    """On stdout, once: torchrun's first process speaks for all."""
    if int(os.environ.get("RANK", "0")) == 0:
        sys.stdout.write(f"{line}\n")


def _score(given: argparse.Namespace) -> None:
    from ..device import check_device
    from .score import score_folder

    scores = score_folder(
        given.pictures, reference=given.reference, inception=given.inception, clip=given.clip, batch_size=given.batch_size,
        device=check_device(given.device),
    )  # fmt: skip
    sys.stdout.write(scores.to_json() if given.json else scores.describe())
