"""A prompt file that pixart.Pipeline writes, in the node: the states, words and encoder that the node itself would give."""
from __future__ import annotations

from pathlib import Path

import folder_paths
import pytest
import torch

from pixart import Pipeline
from tests.support import host, host_models

pytest.importorskip("diffusers")
from tests.support.tiny_pipeline import make_parts

nodes = host.pack_module("nodes.prompts")
text_nodes = host.pack_module("nodes.text")
encoder = host.pack_module("nodes.host.text_encoder")


@pytest.mark.parametrize("precision", [None, "fp8_e4m3fn"])
def test_from_the_pipeline_into_the_node(precision: str | None, sigma, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))
    parts = make_parts(tmp_path / "sigma")
    pipe = Pipeline.from_files(parts.folder, parts.folder, text_precision=precision)
    pipe.save_prompt(tmp_path / "input" / "prompts" / "red.safetensors", "A Red circle")

    out = nodes.PixArtLoadPrompt.execute("red.safetensors", sigma)
    found, shown = out.result[0], out.ui.as_dict()["text"][0]
    assert torch.equal(found[0][0], pipe.encode("A Red circle").states.float()) and "A Red circle" in shown
    clip = encoder.load_t5(str(parts.folder), precision or "default", "default")
    own = text_nodes.PixArtTextEncode.execute(clip=clip, text="a red circle").result[0]
    assert own[0][1]["pixart_prompt"]["encoder"] == pipe.text_encoder.fingerprint and pipe.text_encoder.fingerprint in shown
    if precision is None:
        torch.testing.assert_close(found[0][0], own[0][0], rtol=1e-3, atol=1e-4)
        empty = text_nodes.PixArtTextEncode.execute(clip=clip, text="").result[0]
        torch.testing.assert_close(
            host_models.sample(sigma, found, empty), host_models.sample(sigma, own, empty), rtol=1e-2, atol=1e-3
        )
