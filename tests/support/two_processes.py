"""Runs of the tiny model under torchrun: `two_processes.py RUNS.json`, a list of [recipe's path, changes, stop]; see test_processes.py."""
from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from pixart.checkpoints import load_transformer
from pixart.training import initialize
from pixart.training.methods import full
from pixart.training.run import train
from pixart.training.sources import scenes
from tests.support.tiny_training import VARIANT, TwoPictures


def main() -> None:
    """Every run in turn; one process, or as many as torchrun starts."""
    torch.set_num_threads(1)
    full.get_variant, scenes.Part = lambda name: VARIANT, TwoPictures
    initialize.load_transformer = lambda path, variant, dtype: load_transformer(path, dtype=dtype)
    for path, changes, stop in json.loads(Path(sys.argv[1]).read_text()):
        train(path, changes, stop_after=stop)


if __name__ == "__main__":
    main()
