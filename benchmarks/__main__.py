"""`python -m benchmarks NAME [options]`; README.md has the names."""
from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

from tests.support.card import PRETEND

FOLDER = Path(__file__).parent
MAIN = "\ndef main("  # which the modules beside the benchmarks don't have


def main(arguments: list[str]) -> int:
    """Hands the rest of the command line to that benchmark; 2 for a name there is none of."""
    names = sorted(file.stem for file in FOLDER.glob("*.py") if file.stem != "__main__" and MAIN in file.read_text(encoding="utf-8"))
    if not arguments or arguments[0] not in names:
        sys.stderr.write(f"usage: python -m benchmarks {{{','.join(names)}}} [options]; -h after a name lists its options\n")
        return 2
    if os.environ.get(PRETEND):
        importlib.import_module("tests.support.card.machine").install()
    importlib.import_module(f"benchmarks.{arguments[0]}").main(arguments[1:])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
