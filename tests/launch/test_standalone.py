"""What quickstart.py --standalone runs inside the environment."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("diffusers")

from launch import standalone


def test_a_value_that_can_not_be_drawn_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="^quickstart: width is 0; expected 1 to 16384 pixels") as left:
        standalone.main(["--width=0", "--output", str(tmp_path / "x.png"), "--", "-5 stars"])
    assert isinstance(left.value.code, str)  # goes to stderr, and the exit status is 1
