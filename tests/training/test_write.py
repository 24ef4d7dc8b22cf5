"""Files that appear whole or not at all."""
from __future__ import annotations

import errno
from pathlib import Path

import pytest

from pixart.training.write import replace_file


def fill_the_disk(_: Path) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_names_the_file_and_leaves_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("old", encoding="utf-8")
    with pytest.raises(OSError, match="No space left on device: .*a.txt'") as caught:
        replace_file(tmp_path / "a.txt", fill_the_disk)
    assert caught.value.errno == errno.ENOSPC
    assert [(path.name, path.read_text(encoding="utf-8")) for path in tmp_path.iterdir()] == [("a.txt", "old")]


@pytest.mark.parametrize("name", ["x" * 255, "\u732b" * 85])
def test_names_as_long_as_a_file_system_takes_them(tmp_path: Path, name: str) -> None:
    replace_file(tmp_path / name, lambda partial: partial.write_text("new", encoding="utf-8"))
    assert [path.name for path in tmp_path.iterdir()] == [name]
