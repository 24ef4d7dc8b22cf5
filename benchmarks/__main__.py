"""`python -m benchmarks NAME`: runs benchmarks.NAME."""
from __future__ import annotations

import sys
from importlib import import_module

NAMES = ("full_size", "text")


def main(arguments: list[str]) -> int:
    """The benchmark's own exit code, or 2 for a name there is none of."""
    if not arguments or arguments[0] not in NAMES:
        sys.stderr.write(f"usage: python -m benchmarks {{{','.join(NAMES)}}} ...\n")
        return 2
    import_module(f"benchmarks.{arguments[0]}").main(arguments[1:])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
