"""PixArtLoraLoader: every format on the host's weights equals sums by hand, in any precision, and comes off again."""
from __future__ import annotations

import logging
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import Linear

from tests.support import adapter_factory, host, tiny_text
from tests.support.host_models import ADDED, captions, difference, load_model, sample, write_model

errors = host.pack_module("pixart.errors")
Loader = host.pack_module("nodes.lora").PixArtLoraLoader
PREFIX = "diffusion_model."


def weights_of(model) -> dict[str, torch.Tensor]:
    """A copy of the native weights as they are in memory."""
    state = model.model.state_dict()
    return {key[len(PREFIX) :]: value.clone() for key, value in state.items() if key.startswith(PREFIX)}


@torch.no_grad()
def patched_weights(model) -> dict[str, torch.Tensor]:
    """The weights that the host samples with."""
    model.patch_model(device_to=torch.device("cpu"))
    found = weights_of(model)
    model.unpatch_model()
    return found


def save(sample_: adapter_factory.Sample, models: Path, name: str = "style.safetensors") -> str:
    save_file(sample_.tensors, str(models / "loras" / name))
    return name


def apply(model, name: str, strength: float = 1.0):
    return Loader.execute(model, name, strength).result[0]


@pytest.mark.parametrize("name", adapter_factory.FORMATS)
def test_weights_equal_sums_by_hand(sigma, models: Path, name: str) -> None:
    weights = weights_of(sigma)
    adapter = adapter_factory.make(name, weights)
    found = patched_weights(apply(sigma, save(adapter, models), -0.7))
    expected = adapter.merged(weights, -0.7)
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-5)
    assert all(not torch.equal(found[change.key], weights[change.key]) for change in adapter.changes)
    assert all(torch.equal(value, weights[key]) for key, value in weights_of(sigma).items())


@pytest.mark.parametrize("name", adapter_factory.FORMATS)
def test_newer_hosts_bring_patches_to_the_card_and_sum_the_same(sigma, models: Path, name: str) -> None:
    """With dynamic memory the host makes every adapter anew, around tensors that it has moved."""
    patch_of = comfy.model_patcher.LowVramPatch
    if not hasattr(patch_of, "memory_required"):
        pytest.skip("this host patches weights in place only")
    weights = weights_of(sigma)
    adapter = adapter_factory.make(name, weights)
    patches = apply(sigma, save(adapter, models)).patches
    expected = adapter.merged(weights, 1.0)
    for key in patches:
        patch = patch_of(key, patches)
        assert patch.memory_required() > 0
        patch.prepare(torch.empty(patch.memory_required(), dtype=torch.uint8), None)
        found = patch(weights[key.removeprefix(PREFIX)].clone())
        torch.testing.assert_close(found, expected[key.removeprefix(PREFIX)], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp8_e4m3fn", "fp8_e5m2"])
@pytest.mark.parametrize("name", adapter_factory.FORMATS)
def test_other_precisions_are_summed_in_fp32(sigma_file: Path, models: Path, dtype: str, name: str) -> None:
    """bf16 and fp16 round to the nearest; fp8 up or down by chance, as the host does it: to one of the two neighbours."""
    model = load_model(sigma_file, weight_dtype=dtype)
    weights = weights_of(model)
    adapter = adapter_factory.make(name, weights)
    found = patched_weights(apply(model, save(adapter, models), 0.5))
    expected = adapter.merged(weights, 0.5)
    spacing = {"fp8_e4m3fn": (2**-3, 2**-9), "fp8_e5m2": (2**-2, 2**-16)}.get(dtype)
    for change in adapter.changes:
        value, wanted = found[change.key], expected[change.key]
        assert value.dtype == weights[change.key].dtype
        if spacing is None:
            assert float((value == wanted.to(value.dtype)).float().mean()) > 0.999  # sums in another order may round apart
            torch.testing.assert_close(value, wanted.to(value.dtype), rtol=8e-3, atol=1e-6)
        else:
            assert bool(((value.float() - wanted).abs() <= spacing[0] * wanted.abs() + spacing[1]).all())
            assert abs(float((value.float() - wanted).mean())) < 0.01 * float(wanted.abs().mean())
    assert all(torch.equal(value.float(), weights[key].float()) for key, value in weights_of(model).items())


def test_a_stack_is_the_sum_and_bypass_takes_it_off(sigma, models: Path, tmp_path: Path) -> None:
    """Two loaders in a row, compared with the picture of a file into which both were merged by hand."""
    weights, plain = weights_of(sigma), sample(sigma, captions(5), captions(2, seed=1))
    first, second = adapter_factory.make("onetrainer", weights), adapter_factory.make("loha", weights, 1)
    names = save(first, models, "first.safetensors"), save(second, models, "second.safetensors")
    expected = second.merged(first.merged(weights, 0.6), -0.4)
    save_file({key: value.contiguous() for key, value in expected.items()}, str(tmp_path / "merged.safetensors"))
    one = apply(sigma, names[0], 0.6)
    both = apply(one, names[1], -0.4)
    found = sample(both, captions(5), captions(2, seed=1))
    assert difference(found, sample(load_model(tmp_path / "merged.safetensors"), captions(5), captions(2, seed=1))) < ADDED
    alone = sample(one, captions(5), captions(2, seed=1))  # the second bypassed
    assert difference(alone, found) > 1e-3 and difference(alone, plain) > 1e-3
    assert torch.equal(sample(sigma, captions(5), captions(2, seed=1)), plain)  # both bypassed
    off = apply(apply(one, names[0], -0.6), names[1], 0.0)
    assert difference(sample(off, captions(5), captions(2, seed=1)), plain) < ADDED


def test_the_hosts_own_loader_agrees_where_it_maps_the_keys(sigma, models: Path) -> None:
    import nodes as host_nodes

    for name in ("diffusers", "peft", "old-peft", "native"):
        adapter = adapter_factory.make(name, weights_of(sigma))
        save(adapter, models)
        theirs = patched_weights(host_nodes.LoraLoaderModelOnly().load_lora_model_only(sigma, "style.safetensors", 0.5)[0])
        ours = patched_weights(apply(sigma, "style.safetensors", 0.5))
        assert all(torch.allclose(theirs[change.key], ours[change.key], atol=1e-6) for change in adapter.changes)


def test_what_the_hosts_trainer_writes_beside_lora(sigma, models: Path) -> None:
    """OFT with its constraint, differences of biases, and of tables; at strength 1 the host turns weights as the formula does."""
    import nodes as host_nodes

    order = torch.Generator().manual_seed(3)
    tensors = {
        "diffusion_model.blocks.0.attn.qkv.oft_blocks": torch.randn(36, 12, 12, generator=order) * 0.05,
        "diffusion_model.blocks.0.attn.qkv.alpha": torch.tensor(1.0),
        "diffusion_model.blocks.0.attn.qkv.diff_b": torch.randn(432, generator=order) * 0.1,
        "diffusion_model.blocks.1.scale_shift_table.diff": torch.randn(6, 144, generator=order) * 0.1,
    }
    save_file(tensors, str(models / "loras" / "trained.safetensors"))
    theirs = patched_weights(host_nodes.LoraLoaderModelOnly().load_lora_model_only(sigma, "trained.safetensors", 1.0)[0])
    ours, before = patched_weights(apply(sigma, "trained.safetensors", 1.0)), weights_of(sigma)
    for name in ("blocks.0.attn.qkv.weight", "blocks.0.attn.qkv.bias", "blocks.1.scale_shift_table"):
        assert torch.allclose(theirs[name], ours[name], atol=1e-5) and not torch.allclose(ours[name], before[name], atol=1e-3)


def test_tables_of_a_model_from_another_loader(sigma_file: Path, models: Path) -> None:
    """The host itself passes over raw parameters; and what it can't reach is refused."""
    model = load_model(sigma_file)
    model.callbacks.clear()
    change = torch.randn(6, 144)
    save_file({"diffusion_model.blocks.2.scale_shift_table.diff": change}, str(models / "loras" / "tables.safetensors"))
    before, found = weights_of(model), patched_weights(apply(apply(model, "tables.safetensors", 0.5), "tables.safetensors", 1.0))
    torch.testing.assert_close(found["blocks.2.scale_shift_table"], before["blocks.2.scale_shift_table"] + 1.5 * change)
    assert all(torch.equal(value, before[key]) for key, value in weights_of(model).items())
    save_file({"diffusion_model.y_embedder.y_embedding.diff": torch.randn(300, 32)}, str(models / "loras" / "null.safetensors"))
    with pytest.raises(errors.CheckpointError, match="none of its 1 keys fit"):
        apply(model, "null.safetensors")


def test_a_summary_is_shown_and_logged(sigma, models: Path, caplog: pytest.LogCaptureFixture) -> None:
    adapter = adapter_factory.make("onetrainer", weights_of(sigma))
    name, count = save(adapter, models), len(adapter.tensors)
    with caplog.at_level(logging.INFO):
        shown = Loader.execute(sigma, name, 1.0).ui.as_dict()["text"][0]
    assert shown == f"style.safetensors: {count} of {count} keys applied (12 layers, LoRA, rank 4)"
    assert any(shown in record.getMessage() and record.levelno == logging.INFO for record in caplog.records)
    adapter.tensors["transformer.pos_embed.pos_embed"] = torch.ones(1, 4, 144)
    save(adapter, models)
    with caplog.at_level(logging.INFO):
        shown = Loader.execute(sigma, name, 1.0).ui.as_dict()["text"][0]
    assert shown.endswith("not applied: 1 positions, which are computed: transformer.pos_embed.pos_embed")
    assert any(shown in record.getMessage() and record.levelno == logging.WARNING for record in caplog.records)


class TestTextEncoder:
    @pytest.fixture
    def clip(self, models: Path):
        tiny_text.save_t5_file(tiny_text.tiny_t5(), models / "text_encoders" / "t5.safetensors")
        node = host.pack_module("nodes.text").PixArtT5Loader
        return node.execute(t5_name="t5.safetensors", precision="fp32", device="cpu").result[0]

    @pytest.fixture
    def adapter(self, sigma, models: Path) -> dict:
        tensors = adapter_factory.make("onetrainer", weights_of(sigma)).tensors
        for layer in ("encoder_block_1_layer_0_SelfAttention_v", "encoder_block_0_layer_1_DenseReluDense_wi_1"):
            rows = 64 if "wi" in layer else 32
            tensors[f"lora_te_{layer}.lora_up.weight"] = torch.randn(rows, 2)
            tensors[f"lora_te_{layer}.lora_down.weight"] = torch.randn(2, 32)
            tensors[f"lora_te_{layer}.alpha"] = torch.tensor(1.0)
        save_file(tensors, str(models / "loras" / "text.safetensors"))
        return tensors

    def test_is_changed_where_it_is_connected(self, sigma, clip, adapter: dict) -> None:
        before = {key: value.clone() for key, value in clip.cond_stage_model.state_dict().items()}
        patched = Loader.execute(sigma, "text.safetensors", 1.0, clip, -0.5).result[1]
        comfy.model_management.load_models_gpu([patched.patcher])
        found = {key: value.clone() for key, value in patched.cond_stage_model.state_dict().items()}
        comfy.model_management.load_models_gpu([clip.patcher])
        assert all(torch.equal(value, before[key]) for key, value in clip.cond_stage_model.state_dict().items())
        changed = {key for key, value in found.items() if not torch.equal(value, before[key])}
        key = "t5xxl.transformer.encoder.block.1.layer.0.SelfAttention.v.weight"
        assert changed == {key, "t5xxl.transformer.encoder.block.0.layer.1.DenseReluDense.wi_1.weight"}
        name = "lora_te_encoder_block_1_layer_0_SelfAttention_v"
        change = adapter[f"{name}.lora_up.weight"] @ adapter[f"{name}.lora_down.weight"] / 2
        torch.testing.assert_close(found[key].float(), before[key].float() - 0.5 * change, rtol=1e-3, atol=1e-3)

    def test_is_left_out_only_on_request(self, sigma, adapter: dict) -> None:
        with pytest.raises(errors.CheckpointError, match="6 of .* keys can't be applied, so none was; .*connect a CLIP.*strength_clip 0"):
            Loader.execute(sigma, "text.safetensors", 1.0)
        assert not sigma.patches
        output = Loader.execute(sigma, "text.safetensors", 1.0, None, 0.0)
        assert output.result[1] is None
        shown = output.ui.as_dict()["text"][0]
        assert "6 for T5, and no text encoder is given: lora_te_encoder_block_*_layer_" in shown and "SelfAttention_v.lora_up" in shown


class TestFiles:
    def test_a_peft_folder_is_in_the_menu(self, sigma, models: Path) -> None:
        adapter = adapter_factory.make("peft", weights_of(sigma))
        folder = models / "loras" / "mine"
        folder.mkdir()
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8}')
        save_file(adapter.tensors, str(folder / "adapter_model.safetensors"))
        assert "mine" in Loader.INPUT_TYPES()["required"]["lora_name"][1]["options"]
        expected = adapter.merged(weights_of(sigma), 2.0)  # alpha 8 / rank 4
        for name in ("mine", "mine/adapter_model.safetensors"):
            found = patched_weights(apply(sigma, name))
            assert all(torch.allclose(found[change.key], expected[change.key], atol=1e-4) for change in adapter.changes)

    @pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "absent.safetensors"])
    def test_names_outside_the_folder_are_refused(self, sigma, models: Path, name: str) -> None:
        save_file({"a.lora_up.weight": torch.randn(2)}, str(models / "secret.safetensors"))
        with pytest.raises(errors.CheckpointError, match="not in the folder loras"):
            apply(sigma, name)

    def test_a_lora_for_another_model_leaves_nothing_behind(self, sigma, models: Path) -> None:
        weights = weights_of(sigma)
        module = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
        tensors = {f"{module}.lora_up.weight": torch.randn(8, 2), f"{module}.lora_down.weight": torch.randn(2, 8)}
        save_file(tensors, str(models / "loras" / "sd.safetensors"))
        with pytest.raises(errors.CheckpointError, match="none of its 2 keys fit.*Stable Diffusion"):
            apply(sigma, "sd.safetensors")
        assert not sigma.patches and all(torch.equal(value, weights[key]) for key, value in weights_of(sigma).items())

    def test_other_models_are_refused(self, models: Path) -> None:
        class Other:
            model = Linear(1, 1)

        save_file({"a.lora_up.weight": torch.randn(2)}, str(models / "loras" / "a.safetensors"))
        with pytest.raises(errors.InputError, match="Linear, not a PixArt.*LoraLoaderModelOnly"):
            apply(Other(), "a.safetensors")


def test_a_model_of_another_width_is_refused(models: Path, tmp_path: Path) -> None:
    narrow = load_model(write_model(tmp_path, hidden=72))
    wide = load_file(write_model(tmp_path / "wide", hidden=144))
    with pytest.raises(errors.CheckpointError, match="another model"):
        apply(narrow, save(adapter_factory.make("diffusers", wide), models))


def test_a_distilled_lora_tells_how_to_sample_on_the_node_and_in_the_log(sigma, models: Path, caplog) -> None:
    adapter = adapter_factory.make(next(iter(adapter_factory.FORMATS)), weights_of(sigma))
    note = host.pack_module("pixart.sampling_note")
    save_file(adapter.tensors, str(models / "loras" / "few.safetensors"), metadata=note.note_metadata(note.LCM))
    with caplog.at_level(logging.INFO):
        shown = Loader.execute(sigma, "few.safetensors", 1.0).ui.as_dict()["text"][0]
    assert "sampler lcm, scheduler simple, 4 steps, cfg 1" in caplog.text and note.LCM.describe() in shown
