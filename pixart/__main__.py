"""`python -m pixart`."""
import io
import sys

from .cli import main

if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a console of any code page: what it can't show is spelled as \u03b1
            stream.reconfigure(errors="backslashreplace")
    sys.exit(main())
