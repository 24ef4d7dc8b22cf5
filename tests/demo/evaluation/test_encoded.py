"""What the autoencoder alone loses."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from demo.evaluation import encoded
from demo.training.autoencoder import build_decoder, load_decoder


def test_the_demos_autoencoder_keeps_narrow_scenes_and_an_untrained_one_nothing() -> None:
    found = encoded.measure(load_decoder(), 352, 176, 5)
    assert found["one_object"]["correct"] >= 0.8 and found["two_objects"]["correct"] >= 0.8
    assert found["two_objects"]["pictures"] == 5 and found["two_objects"]["outlines"]["all"] > 0.9
    with torch.no_grad():
        assert encoded.measure(build_decoder(), 352, 176, 2)["one_object"]["correct"] == 0


def test_it_is_written_for_every_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoded, "ASPECT_SIZES", ((256, 128), (128, 256)))
    encoded.main(["--count", "1", "--out", str(tmp_path / "new/encoded.json")])
    assert list(json.loads((tmp_path / "new/encoded.json").read_text())["runs"]) == ["256x128", "128x256"]
