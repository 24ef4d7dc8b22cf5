"""Which pictures a run was begun with, so that one that has vanished, come or changed is named when it goes on."""
from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from ..errors import ConfigError
from .write import replace_file

NAME = "contents.txt"
SHOWN = 5


def contents_mark(lines: Sequence[str]) -> str:
    """A short hash of a source's `contents`, for the state."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def keep_contents(run_dir: Path, lines: Sequence[str]) -> None:
    """The lines themselves, beside the states."""
    replace_file(run_dir / NAME, lambda path: path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8"))


def check_contents(run_dir: Path, then: str | None, lines: Sequence[str]) -> None:
    """Raises ConfigError where the pictures are others than when a state was made, whose mark is `then`."""
    if then is None or then == contents_mark(lines):
        return
    file = run_dir / NAME
    before = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    raise ConfigError(
        f"The pictures of the run in {run_dir} are not the ones it started with: {_difference(before, lines) or 'their order'}. "
        "Put them back, continue with these by --accept-changes, or start over with --overwrite."
    )


def _difference(before: Sequence[str], now: Sequence[str]) -> str:
    """As "gone a.png; new b.png; changed c.png"."""
    then, found = ({line.rsplit(" ", 2)[0]: line for line in lines} for lines in (before, now))
    gone, new = [name for name in then if name not in found], [name for name in found if name not in then]
    changed = [name for name in then if name in found and then[name] != found[name]]
    kinds = {"gone": gone, "new": new, "changed": changed}
    return "; ".join(f"{kind} {_some(names)}" for kind, names in kinds.items() if names)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
