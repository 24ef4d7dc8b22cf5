"""`python -m benchmarks NAME [options]`; README.md has the names."""
from __future__ import annotations

import importlib
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
HELPERS = ("__init__", "__main__", "report", "peers", "timing", "plots", "rate", "text_report", "xxl", "graph_report", "scale_stages", "scale_paper")


def main(arguments: list[str]) -> int:
    """Hands the rest of the command line to that benchmark; 2 for a name there is none of."""
    names = sorted(file.stem for file in FOLDER.glob("*.py") if file.stem not in HELPERS)
    if not arguments or arguments[0] not in names:
        sys.stderr.write(f"usage: python -m benchmarks {{{','.join(names)}}} [options]; -h after a name lists its options\n")
        return 2
    importlib.import_module(f"benchmarks.{arguments[0]}").main(arguments[1:])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
