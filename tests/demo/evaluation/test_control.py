"""The ControlNet's evaluation: both runs see the same questions, and the hint reaches the model."""
import numpy as np
import torch
from safetensors.torch import save_file

from demo.evaluation import control as evaluate_control
from demo.evaluation.prompts import Run
from pixart import Pipeline
from pixart.controlnet import ControlNetConfig, PixArtControlNet, copy_base_blocks
from tests.support.tiny_pipeline import make_parts


def test_with_and_without(tmp_path, monkeypatch):
    folder = make_parts(tmp_path / "parts").folder
    pipeline = Pipeline.from_files(folder, folder, folder, dtype=torch.float32)
    config = pipeline.transformer.config
    control = PixArtControlNet(ControlNetConfig(config.hidden_size, 1, config.num_heads, config.mlp_hidden))
    copy_base_blocks(control, pipeline.transformer)
    for layer in (control.controlnet[0].before_proj, control.controlnet[0].after_proj):
        torch.nn.init.normal_(layer.weight, std=0.5)
    save_file(control.state_dict(), tmp_path / "control.safetensors")
    seen = []
    monkeypatch.setattr(evaluate_control, "check", lambda scene, picture, stated: seen.append((scene, picture)) or scene)
    monkeypatch.setattr(evaluate_control, "summarise", lambda verdicts: {"pictures": len(verdicts)})
    report = evaluate_control.evaluate(pipeline, tmp_path / "control.safetensors", Run("heldout", 3, 64, 64), steps=2, batch=2)
    for figures in (report["runs"]["with outlines"], report["runs"]["without"]):
        assert set(figures) == {"one_object", "two_objects"}
        assert all(kind["pictures"] == 3 and 0 <= kind["overlap"] <= 1 for kind in figures.values())
    first, second = seen[:6], seen[6:]
    assert [scene for scene, _ in first] == [scene for scene, _ in second]
    assert any(not np.array_equal(a, b) for (_, a), (_, b) in zip(first, second))


def test_overlap_is_of_objects_not_of_backgrounds():
    wanted = np.full((16, 16, 3), 0.9)
    wanted[4:8, 4:8] = (1, 0, 0)
    other = np.full((16, 16, 3), 0.2)
    other[4:8, 6:10] = (1, 1, 0)
    assert evaluate_control.overlap(wanted, wanted) == 1
    assert evaluate_control.overlap(other, wanted) == 8 / 24
    assert evaluate_control.overlap(np.zeros((16, 16, 3)), np.ones((16, 16, 3))) == 0
