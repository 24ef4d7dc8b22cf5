"""PixArtModelLoader: every format gives the core's picture, every bad file one error that says what to do."""
from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import checkpoint_factory, host, host_models
from tests.support.host_models import CAPTIONS, captions, difference, forward, noise, sample

errors = host.pack_module("pixart.errors")
core = host.pack_module("pixart.checkpoints.load")
node = host.pack_module("nodes.model").PixArtModelLoader


def inputs(batch: int = 3, height: int = 8, width: int = 12):
    """A batch of captions of unequal length with a mask."""
    states = torch.randn(batch, 7, CAPTIONS, generator=torch.Generator().manual_seed(5))
    mask = torch.arange(7)[None] < torch.tensor([7, 1, 4])[:batch, None]
    return noise(height, width, batch), torch.tensor([999.0, 400.0, 3.0])[:batch], states, mask


@pytest.mark.parametrize("kind", [kind for kind in checkpoint_factory.FORMATS if kind != "pth-ema"])
def test_every_format_equals_the_core(kind: str, models: Path) -> None:
    folder = models / "diffusion_models" / "x"
    path = host_models.write_model(folder, kind)
    shown = path.parent if path.name == "transformer" else path  # a folder is listed under its model's name
    name = shown.relative_to(models / "diffusion_models").as_posix()
    listed = node.INPUT_TYPES()["required"]["model_name"][1]["options"]
    assert name in listed
    model = node.execute(model_name=name, variant="auto", weight_dtype="default").result[0]
    reference = core.load_transformer(path)
    for size in ((8, 12), (7, 9)):
        latent, step, states, mask = inputs(3, *size)
        expected = reference(latent, step, states, mask)[:, :4].detach()
        found = forward(model, latent, step, states, context_mask=mask)
        assert found.shape == latent.shape and difference(found, expected) < 1e-5


def test_diffusers_is_the_independent_reference(models: Path) -> None:
    config, diffusers, original = checkpoint_factory.tiny_weights(captions=CAPTIONS)
    path = checkpoint_factory.write("diffusers-folder", models / "diffusion_models" / "x", config, diffusers, original)
    model = host_models.load_model(path)
    latent, step, states, mask = inputs(3, 64, 64)  # half of sample_size, as diffusers scales positions itself
    reference = checkpoint_factory.reference_model({**config, "sample_size": 64, "interpolation_scale": 1.0})
    with torch.no_grad():
        expected = reference(
            latent, encoder_hidden_states=states, timestep=step, encoder_attention_mask=mask.long(),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample  # fmt: skip
    assert difference(forward(model, latent, step, states, context_mask=mask), expected[:, :4]) < 1e-5


@pytest.mark.parametrize("prefix", checkpoint_factory.PREFIXES)
def test_prefixes(prefix: str, tmp_path: Path, sigma, sigma_file: Path) -> None:
    save_file({prefix + key: value for key, value in load_file(sigma_file).items()}, tmp_path / "m.safetensors")
    latent, step, states, mask = inputs()
    again = forward(host_models.load_model(tmp_path / "m.safetensors"), latent, step, states, context_mask=mask)
    assert torch.equal(again, forward(sigma, latent, step, states, context_mask=mask))


@pytest.mark.parametrize(
    ("name", "dtype", "worst"),
    [("fp32", torch.float32, 1e-6), ("bf16", torch.bfloat16, 2e-2), ("fp16", torch.float16, 2e-2),
     ("fp8_e4m3fn", torch.float8_e4m3fn, 0.2), ("fp8_e5m2", torch.float8_e5m2, 0.4)],
)  # fmt: skip
def test_weight_dtypes(name: str, dtype: torch.dtype, worst: float, sigma, sigma_file: Path) -> None:
    model = host_models.load_model(sigma_file, weight_dtype=name)
    assert model.model.diffusion_model.blocks[0].mlp.fc1.weight.dtype == dtype
    assert model.model.get_dtype() == dtype
    latent, step, states, mask = inputs()
    expected = forward(sigma, latent, step, states, context_mask=mask)
    computing = model.model.manual_cast_dtype or dtype
    found = forward(model, latent.to(computing), step, states.to(computing), context_mask=mask)
    assert difference(found.float(), expected) < worst
    assert torch.isfinite(sample(model, captions(5), captions(2, seed=1), steps=2)).all()


def test_fp8_file_loads(tmp_path: Path, sigma_file: Path) -> None:
    save_file({key: value.to(torch.float8_e4m3fn) for key, value in load_file(sigma_file).items()}, tmp_path / "m.safetensors")
    model = host_models.load_model(tmp_path / "m.safetensors")
    assert torch.isfinite(sample(model, captions(5), captions(2, seed=1), steps=2)).all()


@pytest.mark.skipif(host.on_pretended_card(), reason="the host's quantized tensors are a tensor class too")
def test_scaled_fp8_file_loads(tmp_path: Path, sigma, sigma_file: Path) -> None:
    """As ComfyUI users have them: fp8 weights with a scale each, marked by `scaled_fp8`."""
    state = load_file(sigma_file)
    for key in [key for key in state if key.endswith(("qkv.weight", "fc1.weight"))]:
        scale = state[key].abs().max() / 448
        state[key.replace(".weight", ".scale_weight")] = scale.reshape(())
        state[key] = (state[key] / scale).to(torch.float8_e4m3fn)
    state["scaled_fp8"] = torch.tensor([0.0, 0.0]).to(torch.float8_e4m3fn)  # two elements: full-precision products
    save_file(state, tmp_path / "m.safetensors")
    model = host_models.load_model(tmp_path / "m.safetensors")
    plain = sample(sigma, captions(5), captions(2, seed=1), steps=2)
    assert 1e-6 < difference(sample(model, captions(5), captions(2, seed=1), steps=2), plain) < 0.2


def test_a_distilled_file_tells_how_to_sample(sigma_file: Path, models: Path, caplog) -> None:
    note = host.pack_module("pixart.sampling_note")
    path = models / "diffusion_models" / "student.safetensors"
    save_file(load_file(sigma_file), path, metadata=note.note_metadata(note.dmd_note(400)))
    with caplog.at_level(logging.INFO):
        model = node.execute(model_name=path.name, variant="auto", weight_dtype="default").result[0]
    assert "distilled to one step at timestep 400" in caplog.text
    assert host.pack_module("nodes.host.one_step").many_step_warning(model) is None


def test_report_is_logged(sigma_file: Path, caplog) -> None:
    with caplog.at_level(logging.INFO):
        host_models.load_model(sigma_file)
    assert "family:" in caplog.text and "why:" in caplog.text and "y_embedding has 300 rows" in caplog.text
    assert "VAE:               SDXL" in caplog.text


def test_variant_decides_what_weights_cannot(tmp_path: Path) -> None:
    path = host_models.write_model(tmp_path, null_rows=None)
    assert host_models.load_model(path).model.model_config.unet_config["image_model"] == "pixart_sigma"
    alpha = host_models.load_model(path, variant="alpha-256")
    assert alpha.model.model_config.unet_config["image_model"] == "pixart_alpha"
    assert alpha.model.latent_format.scale_factor == 0.18215
    assert alpha.model.diffusion_model.config.position_range == 16


def test_host_can_rebuild_the_model(sigma, sigma_file: Path) -> None:
    factory, arguments = sigma.cached_patcher_init
    again = factory(*arguments, disable_dynamic=True)
    assert arguments[0] == str(sigma_file) and again.model is not sigma.model
    assert torch.equal(sample(again, captions(3), captions(1)), sample(sigma, captions(3), captions(1)))


class TestBadFiles:
    """Each is refused with the file's name and advice, before any model exists."""

    def refused(self, path: Path) -> str:
        with pytest.raises(errors.CheckpointError) as caught:
            host_models.load_model(path)
        assert str(path) in str(caught.value)
        return str(caught.value)

    def test_empty(self, tmp_path: Path) -> None:
        (tmp_path / "m.safetensors").touch()
        assert "empty" in self.refused(tmp_path / "m.safetensors")

    def test_truncated(self, tmp_path: Path, sigma_file: Path) -> None:
        (tmp_path / "m.safetensors").write_bytes(sigma_file.read_bytes()[:-100])
        assert "truncated" in self.refused(tmp_path / "m.safetensors")

    def test_missing_and_nan(self, tmp_path: Path, sigma_file: Path) -> None:
        state = load_file(sigma_file)
        del state["blocks.1.mlp.fc1.weight"]
        state["final_layer.linear.bias"][3] = torch.nan
        save_file(state, tmp_path / "m.safetensors")
        message = self.refused(tmp_path / "m.safetensors")
        assert "missing blocks.1.mlp.fc1.weight" in message and "final_layer.linear.bias has 1 NaN" in message

    @pytest.mark.parametrize(
        ("key", "kind"),
        [("model.diffusion_model.input_blocks.0.0.weight", "Stable Diffusion"), ("blocks.0.attn.qkv.lora_up.weight", "LoRA"),
         ("decoder.conv_in.weight", "VAE"), ("encoder.block.0.layer.0.SelfAttention.q.weight", "T5")],
    )  # fmt: skip
    def test_foreign(self, key: str, kind: str, tmp_path: Path) -> None:
        extra = {"model.diffusion_model.middle_block.0.weight": torch.ones(2)} if kind.startswith("Stable") else {}
        save_file({key: torch.ones(2, 2), **extra}, tmp_path / "m.safetensors")
        assert kind in self.refused(tmp_path / "m.safetensors")

    def test_pickle_with_code(self, tmp_path: Path) -> None:
        class Harmful:
            def __reduce__(self):
                return (Path.touch, (tmp_path / "touched",))

        torch.save({"state_dict": {"t_block.1.weight": Harmful()}}, tmp_path / "m.pth")
        assert "code" in self.refused(tmp_path / "m.pth")
        assert not (tmp_path / "touched").exists()

    @pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "missing.safetensors", ""])
    def test_names_outside_the_menu(self, name: str, models: Path) -> None:
        (models / "secret.safetensors").touch()
        with pytest.raises(errors.CheckpointError, match="not in the folder diffusion_models"):
            node.execute(model_name=name, variant="auto", weight_dtype="default")


def test_where_the_host_maps_weights_the_file_is_not_read_whole(sigma_file: Path, tmp_path: Path, monkeypatch) -> None:
    """A sample of each weight is looked at: a NaN at its beginning is still found."""
    loader = host.pack_module("nodes.host.loader")
    looked = []
    original = core.value_problems

    def watched(tensors, quantized, sampled=None):
        looked.append(sampled)
        return original(tensors, quantized, sampled)

    monkeypatch.setattr(core, "value_problems", watched)
    loader._read(sigma_file, "auto", 16)
    assert looked == [16]
    weights = load_file(sigma_file)
    weights["blocks.0.mlp.fc1.weight"][0, 3] = float("nan")
    save_file(weights, tmp_path / "m.safetensors")
    with pytest.raises(errors.CheckpointError, match="fc1.weight has 1 NaN"):
        loader._read(tmp_path / "m.safetensors", "auto", 16)
    weights["blocks.0.mlp.fc1.weight"][0, 3] = 0
    weights["blocks.0.mlp.fc1.weight"][7, 3] = float("nan")
    save_file(weights, tmp_path / "m.safetensors")
    loader._read(tmp_path / "m.safetensors", "auto", 16)
    with pytest.raises(errors.CheckpointError, match="fc1.weight has 1 NaN"):
        loader._read(tmp_path / "m.safetensors", "auto", None)
