"""A distilled file says how it is sampled; the pipeline draws so, and its log says it."""
from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from pixart import Pipeline
from pixart.errors import InputError
from pixart.sampling_note import LCM, NOTE_KEY, SamplingNote, dmd_note, note_metadata, note_of, read_note
from tests.support.tiny_pipeline import make_parts

BETAS = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return make_parts(tmp_path_factory.mktemp("sigma"))


def distilled(parts, folder: Path, note: SamplingNote) -> Pipeline:
    """The tiny model from a file with a note."""
    plain = Pipeline.from_files(transformer=parts.folder, text_encoder=parts.folder, vae=parts.folder)
    path = folder / "student.safetensors"
    save_file(plain.transformer.state_dict(), path, metadata=note_metadata(note))
    return Pipeline.from_files(path, parts.folder, parts.folder, dtype=torch.float32)


def predict(pipe: Pipeline, latent: torch.Tensor, timestep: int) -> torch.Tensor:
    text = pipe.encode("a red circle")
    with torch.no_grad():
        return pipe.transformer(latent, torch.tensor([timestep]), text.states.float(), text.mask)[:, :4]


def test_lcm_is_drawn_by_diffusers_scheduler_and_a_seed_means_a_picture(parts, tmp_path: Path, caplog) -> None:
    with caplog.at_level(logging.INFO):
        pipe = distilled(parts, tmp_path, LCM)
    assert "sampler lcm, scheduler simple, 4 steps, cfg 1" in caplog.text
    draw = lambda seed: pipe("a red circle", steps=4, guidance=1, width=64, height=64, use_bins=False, seed=seed, output="latent", progress=False)
    scheduler = diffusers.LCMScheduler(**BETAS)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 759, 499, 259]
    generator = torch.Generator().manual_seed(7)
    latent = torch.randn(1, 4, 8, 8, generator=generator)
    for timestep in scheduler.timesteps:
        latent = scheduler.step(predict(pipe, latent, int(timestep)), timestep, latent, generator=generator).prev_sample
    torch.testing.assert_close(draw(7), latent, rtol=1e-4, atol=1e-4)
    assert torch.equal(draw(7), draw(7)) and not torch.equal(draw(7), draw(8))


def test_each_picture_of_a_batch_has_the_noise_of_its_seed(parts, tmp_path: Path) -> None:
    pipe = distilled(parts, tmp_path, LCM)
    options = {"steps": 2, "guidance": 1, "width": 64, "height": 64, "use_bins": False, "output": "latent", "progress": False}
    both = pipe(["a red circle", "a red circle"], seed=[3, 4], **options)
    alone = pipe(["a red circle"], seed=[4], **options)
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-4)


def test_one_step_is_the_picture_that_ddim_sees_at_its_timestep(parts, tmp_path: Path) -> None:
    pipe = distilled(parts, tmp_path, dmd_note(400))
    options = {"guidance": 1, "width": 64, "height": 64, "use_bins": False, "output": "latent", "progress": False, "seed": 1}
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    ddim = diffusers.DDIMScheduler(**BETAS, clip_sample=False)
    ddim.set_timesteps(1000)
    expected = ddim.step(predict(pipe, noise, 400), 400, noise).pred_original_sample
    torch.testing.assert_close(pipe("a red circle", steps=1, **options), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="one-step was given 20 steps; expected 1 step"):
        pipe("a red circle", steps=20, **options)


def test_guidance_on_top_is_warned_of(parts, tmp_path: Path, caplog) -> None:
    pipe = distilled(parts, tmp_path, LCM)
    pipe("a red circle", steps=1, guidance=4.5, width=64, height=64, use_bins=False, output="latent", progress=False)
    assert "the sampler lcm were distilled without guidance; give guidance=1 (it is 4.5)" in caplog.text


def test_a_lora_changes_how_is_drawn_and_a_scheduler_of_ones_own_stays(parts, tmp_path: Path, caplog) -> None:
    lora = {"diffusion_model.blocks.0.attn.proj.lora_down.weight": torch.randn(2, 72), "diffusion_model.blocks.0.attn.proj.lora_up.weight": torch.randn(72, 2)}
    save_file(lora, tmp_path / "lcm.safetensors", metadata=note_metadata(LCM))
    pipe = Pipeline.from_files(transformer=parts.folder, text_encoder=parts.folder, vae=parts.folder)
    pipe.load_lora(tmp_path / "lcm.safetensors", strength=-1.0)
    assert pipe.note is None
    with caplog.at_level(logging.INFO):
        pipe.load_lora(tmp_path / "lcm.safetensors")
    assert pipe.note == LCM and "lcm.safetensors: distilled to few steps (LCM)" in caplog.text
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler(**BETAS)
    options = {"steps": 2, "guidance": 1, "width": 64, "height": 64, "use_bins": False, "output": "latent", "progress": False, "seed": 1}
    own, pipe.scheduler = pipe("a red circle", **options), None
    assert not torch.equal(own, pipe("a red circle", **options))


SOUND = {"method": "lcm", "steps": 4, "timestep": 999}
HOSTILE = [
    "", "{", "[1]", "null", "3", '"lcm"', json.dumps({**SOUND, "method": "os.system"}), json.dumps({**SOUND, "steps": "4"}),
    json.dumps({**SOUND, "steps": 0}), json.dumps({**SOUND, "steps": 10**9}), json.dumps({**SOUND, "steps": True}),
    json.dumps({**SOUND, "timestep": 1000}), json.dumps({**SOUND, "timestep": None}), "[" * 100000,
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_what_is_no_note_is_none(text: str) -> None:
    assert note_of({NOTE_KEY: text}) is None


def test_notes_are_read_back(tmp_path: Path) -> None:
    for note in (LCM, dmd_note(), dmd_note(999)):
        path = tmp_path / f"{note.method}-{note.timestep}.safetensors"
        save_file({"x": torch.zeros(1)}, path, metadata=note_metadata(note))
        assert read_note(path) == note
    for name in ("", "transformer"):
        folder = tmp_path / f"model{name}" / name
        folder.mkdir(parents=True)
        save_file({"x": torch.zeros(1)}, folder / "diffusion_pytorch_model.safetensors", metadata=note_metadata(LCM))
        assert read_note(tmp_path / f"model{name}") == LCM
    assert note_of(None) is None and note_of({}) is None and note_of({NOTE_KEY: json.dumps(SOUND)}) == LCM
    assert "timestep 400 into SamplerCustom, cfg 1" in dmd_note().describe()


@pytest.mark.parametrize("content", [b"", b"no weights", b"\xff" * 64])
def test_a_file_that_is_none_has_no_note(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    found: Any = read_note(tmp_path / "x.safetensors")
    assert found is None and read_note(tmp_path) is None and read_note(tmp_path / "absent.safetensors") is None
