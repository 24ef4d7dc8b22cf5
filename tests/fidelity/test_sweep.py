"""The kept sweep over every zoo entry and bin is whole and within its limit."""
from __future__ import annotations

import json

import pytest

from pixart.config import get_variant
from tests.support.fidelity import FULL_SIZE, LIMIT, RESULT, bins_of, spread, sweep_count


@pytest.mark.parametrize("name", FULL_SIZE)
def test_every_bin_was_measured_and_is_exact(name: str) -> None:
    errors = json.loads(RESULT.read_text())["errors"].get(name, {})
    wanted = {f"{height}x{width}" for height, width in spread(bins_of(name), sweep_count(name))}
    assert not wanted - set(errors), "python -m tests.support.fidelity goes on where it stopped"
    assert max(errors.values()) <= LIMIT
    if get_variant(name).base_size <= 1024:
        assert len(wanted) == 40
