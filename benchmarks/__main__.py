"""`python -m benchmarks NAME [options]`: forward, memory, pipeline, text, full_size, kv_quality."""
from __future__ import annotations

import importlib
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
HELPERS = ("__init__", "__main__", "report", "peers", "timing", "plots")


def main() -> None:
    """Hands the rest of the command line to that benchmark."""
    names = sorted(file.stem for file in FOLDER.glob("*.py") if file.stem not in HELPERS)
    if len(sys.argv) < 2 or sys.argv[1] not in names:
        sys.exit(f"usage: python -m benchmarks {{{','.join(names)}}} [options]; -h after a name lists its options")
    importlib.import_module(f"benchmarks.{sys.argv[1]}").main(sys.argv[2:])


if __name__ == "__main__":
    main()
