"""Every format of LoRA against sums done by hand; what fits and what doesn't; broken and foreign files."""
from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from pixart.adapters import fit_adapter, load_adapter, merge_layers, parameter_shapes
from pixart.checkpoints import load_transformer
from pixart.errors import CheckpointError
from tests.support import adapter_factory, checkpoint_factory

FORMATS = tuple(adapter_factory.FORMATS)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return checkpoint_factory.write("safetensors", tmp_path_factory.mktemp("model"), *checkpoint_factory.tiny_weights(depth=2))


@pytest.fixture
def model(file):
    return load_transformer(file)


@pytest.fixture
def weights(file):
    return load_file(file)


def save(tensors, folder, name="style.safetensors"):
    save_file(tensors, folder / name)
    return folder / name


def merge(path, model, strength=1.0):
    fit = fit_adapter(load_adapter(path), parameter_shapes(model))
    merge_layers(model, fit.layers, strength)
    return fit


def assert_equal(model, expected):
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value.float(), expected[key], rtol=1e-5, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", FORMATS)
def test_merged_weights_equal_sums_by_hand(name, model, weights, file, tmp_path):
    sample = adapter_factory.make(name, weights)
    fit = merge(save(sample.tensors, tmp_path), model, -0.7)
    assert_equal(model, sample.merged(weights, -0.7))
    assert all(not torch.equal(model.state_dict()[change.key], weights[change.key]) for change in sample.changes)
    assert len(fit.layers) == len(sample.changes) and not fit.left
    assert fit.describe().startswith(f"style.safetensors: {len(sample.tensors)} of {len(sample.tensors)} keys applied")
    assert "not applied" not in fit.describe()
    assert all(torch.equal(value, weights[key]) for key, value in load_file(file).items())


def test_stacked_in_any_order_and_taken_off_again(model, weights, tmp_path):
    samples = [adapter_factory.make(name, weights, seed) for seed, name in enumerate(("onetrainer", "lokr", "native"))]
    paths = [save(sample.tensors, tmp_path, f"{i}.safetensors") for i, sample in enumerate(samples)]
    expected = weights
    for sample, strength in zip(samples, (1.0, 0.25, -2.0)):
        expected = sample.merged(expected, strength)
    for i, strength in ((2, -2.0), (0, 1.0), (1, 0.25)):
        merge(paths[i], model, strength)
    assert_equal(model, expected)
    for i, strength in ((0, -1.0), (1, -0.25), (2, 2.0)):
        merge(paths[i], model, strength)
    assert_equal(model, weights)


def test_half_precision_rounds_once(file, weights, tmp_path):
    """Three pieces of a fused weight: one sum in fp32, one rounding."""
    model, sample = load_transformer(file, dtype=torch.bfloat16), adapter_factory.make("diffusers", weights)
    stored = {key: value.clone() for key, value in model.state_dict().items()}
    merge(save(sample.tensors, tmp_path), model, 0.5)
    expected = sample.merged(stored, 0.5)
    assert all(torch.equal(value, expected[key].bfloat16()) for key, value in model.state_dict().items())


def test_torch_files_and_other_precisions(model, weights, tmp_path):
    sample = adapter_factory.make("kohya-fused", weights)
    torch.save({key: value.half() for key, value in sample.tensors.items()}, tmp_path / "style.pt")
    merge(tmp_path / "style.pt", model)
    halved = adapter_factory.make("kohya-fused", weights)
    assert max(float((model.state_dict()[c.key] - halved.merged(weights, 1.0)[c.key]).abs().max()) for c in halved.changes) < 5e-3


def test_keys_that_do_not_fit_are_named(model, weights, tmp_path):
    sample = adapter_factory.make("onetrainer", weights)
    matrices = {"lora_up.weight": torch.randn(144, 4), "lora_down.weight": torch.randn(4, 144)}
    for i in (7, 8):  # the model has two blocks
        sample.tensors.update({f"lora_transformer_transformer_blocks_{i}_attn1_to_q.{end}": m.clone() for end, m in matrices.items()})
    for i in range(3):
        sample.tensors[f"lora_te_encoder_block_{i}_layer_0_SelfAttention_q.lora_up.weight"] = torch.randn(32, 2)
        sample.tensors[f"lora_te_encoder_block_{i}_layer_0_SelfAttention_q.lora_down.weight"] = torch.randn(2, 32)
    sample.tensors["lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha"] = torch.tensor(1.0)
    sample.tensors["lora_transformer_transformer_blocks_0_attn1_to_q.a1.weight"] = torch.randn(2, 2)
    with pytest.raises(CheckpointError) as caught:
        merge(save(sample.tensors, tmp_path), model)
    assert_equal(model, weights)
    line = str(caught.value)
    assert f"6 of its {len(sample.tensors)} keys (GLoRA) can't be applied" in line and "\n" not in line
    assert "4 for layers that this model doesn't have, or keeps quantized: lora_transformer_transformer_blocks_*_attn1_to_q" in line
    assert "1 for another text encoder than T5: lora_te1_text_model_encoder_layers_*_mlp_fc1.alpha" in line
    assert "1 of no supported kind: lora_transformer_transformer_blocks_*_attn1_to_q.a1.weight" in line


def test_layers_of_t5_are_left_and_named_where_no_text_encoder_is_given(model, weights, tmp_path):
    sample = adapter_factory.make("onetrainer", weights)
    for i in range(3):
        sample.tensors[f"lora_te_encoder_block_{i}_layer_0_SelfAttention_q.lora_up.weight"] = torch.randn(32, 2)
        sample.tensors[f"lora_te_encoder_block_{i}_layer_0_SelfAttention_q.lora_down.weight"] = torch.randn(2, 32)
    fit = merge(save(sample.tensors, tmp_path), model)
    assert_equal(model, sample.merged(weights, 1.0))
    line = fit.describe()
    assert f"{len(sample.tensors) - 6} of {len(sample.tensors)} keys applied ({len(sample.changes)} layers, LoRA, rank 4)" in line
    assert "lora_te_encoder_block_*_layer_0_SelfAttention_q.lora_up.weight (3 times)" in line and "no text encoder is given" in line
    assert "\n" not in line and len(fit.left) == 6


FOREIGN = {
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": "Stable Diffusion",
    "lora_unet_input_blocks_8_1_transformer_blocks_9_attn1_to_k": "SDXL",
    "transformer.single_transformer_blocks.3.attn.to_q": "Flux",
    "diffusion_model.double_blocks.3.img_attn.qkv": "Flux",
    "transformer.transformer_blocks.3.attn.add_k_proj": "SD3",
    "diffusion_model.blocks.3.self_attn.q": "Wan",
    "base_model.model.model.layers.0.self_attn.q_proj": "language model",
    "lora_te_text_model_encoder_layers_0_mlp_fc1": "CLIP",
    "some.thing.else": "keys begin with some.thing.else",
}


@pytest.mark.parametrize("module", FOREIGN)
def test_a_lora_for_another_model_is_named(module, model, weights, tmp_path):
    path = save({f"{module}.lora_up.weight": torch.randn(144, 2), f"{module}.lora_down.weight": torch.randn(2, 144)}, tmp_path)
    with pytest.raises(CheckpointError, match=f"none of its 2 keys fit this PixArt model.*{FOREIGN[module]}"):
        merge(path, model)
    assert_equal(model, weights)


def test_the_same_names_in_another_width_are_refused(model, weights, tmp_path):
    """LTX-Video and Sana share names with PixArt; a part of their LoRA must not be merged."""
    module = "transformer.transformer_blocks.0.attn1.to_q"
    good = adapter_factory.make("diffusers", weights).tensors
    wrong = {f"{module}.lora_B.weight": torch.randn(2048, 2), f"{module}.lora_A.weight": torch.randn(2, 2048)}
    with pytest.raises(CheckpointError, match="(?s)another model.*2048 x 2048.*144 x 144"):
        merge(save({**good, **wrong}, tmp_path), model)
    assert_equal(model, weights)


def test_a_lora_of_t5_alone_asks_for_a_text_encoder(model, tmp_path):
    module = "lora_te_encoder_block_0_layer_1_DenseReluDense_wi_0"
    path = save({f"{module}.lora_up.weight": torch.randn(8, 2), f"{module}.lora_down.weight": torch.randn(2, 8)}, tmp_path)
    with pytest.raises(CheckpointError, match="all of it is for T5.*Connect a CLIP"):
        merge(path, model)


BROKEN = {
    "up missing": ({"blocks.0.attn.proj.lora_down.weight": torch.randn(2, 144)}, "only lora_down is there"),
    "down missing": ({"blocks.0.attn.proj.lora_up.weight": torch.randn(144, 2)}, "lora_down is missing"),
    "ranks differ": (
        {"blocks.0.attn.proj.lora_down.weight": torch.randn(3, 144), "blocks.0.attn.proj.lora_up.weight": torch.randn(144, 2)},
        "don't fit each other",
    ),
    "NaN": (
        {"blocks.0.attn.proj.lora_down.weight": torch.full((2, 144), torch.nan), "blocks.0.attn.proj.lora_up.weight": torch.randn(144, 2)},
        "NaN or infinite values in lora_down",
    ),
    "one number": (
        {"blocks.0.attn.proj.lora_down.weight": torch.tensor(1.0), "blocks.0.attn.proj.lora_up.weight": torch.randn(144, 2)},
        "don't fit each other",
    ),
    "alpha": (
        {
            "blocks.0.attn.proj.lora_down.weight": torch.randn(2, 144), "blocks.0.attn.proj.lora_up.weight": torch.randn(144, 2),
            "blocks.0.attn.proj.alpha": torch.tensor(torch.nan),
        },
        "alpha is no finite number",
    ),
    "rank 0": (
        {"blocks.0.attn.proj.lora_down.weight": torch.zeros(0, 144), "blocks.0.attn.proj.lora_up.weight": torch.zeros(144, 0)},
        r"rank 0, or no values: lora_down \(0, 144\), lora_up \(144, 0\)",
    ),
    "two adapters": (
        {f"blocks.0.attn.proj.lora_{side}.{name}.weight": torch.randn(144, 144) for side in "AB" for name in ("default", "other")},
        "lora_A.default.weight and .*lora_A.other.weight are the same matrix",
    ),
    "alone": ({"blocks.0.attn.proj.alpha": torch.tensor(1.0)}, "only alpha is there"),
    "twice": ({f"{p}blocks.0.attn.proj.diff": torch.randn(144, 144) for p in ("", "transformer.")}, "change the same weight"),
    "blocks": ({"blocks.0.attn.proj.oft_blocks": torch.randn(4, 36, 30)}, "expected square blocks"),
    "rescale": ({"blocks.0.attn.proj.oft_blocks": torch.randn(4, 36, 36), "blocks.0.attn.proj.rescale": torch.ones(7, 1)}, "7 factors of rescale for 144 rows"),
    "magnitude": (
        {"blocks.0.mlp.fc1.diff": torch.randn(576, 144), "blocks.0.mlp.fc1.dora_scale": torch.ones(5, 1)},
        r"magnitude has shape \(5, 1\)",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_damaged_files_are_refused_whole(case, model, weights, tmp_path):
    tensors, message = BROKEN[case]
    with pytest.raises(CheckpointError, match=message):
        merge(save({**adapter_factory.make("difference", weights).tensors, **tensors}, tmp_path), model)
    assert_equal(model, weights)


UNREAD = {
    "GLoRA": ("a1.weight", "a2.weight", "b1.weight", "b2.weight"), "(IA)3": ("on_input",), "VeRA": ("vera_lambda_b", "vera_lambda_d"),
    "PEFT's OFT": ("oft_R.weight",), "PEFT's BOFT": ("boft_R", "boft_s"), "AdaLoRA": ("lora_E", "lora_X"), "HRA": ("hra_u",),
}  # fmt: skip


@pytest.mark.parametrize("method", UNREAD)
def test_a_method_that_is_not_read_is_named_alone_and_beside_a_lora(method, model, weights, tmp_path):
    tensors = {f"base_model.model.blocks.{i}.attn.proj.{end}": torch.randn(4, 4) for i in range(2) for end in UNREAD[method]}
    for given in (tensors, {**adapter_factory.make("native", weights).tensors, **tensors}):
        with pytest.raises(CheckpointError) as caught:
            merge(save(given, tmp_path), model)
        assert method in str(caught.value) and "blocks" in str(caught.value)
        assert_equal(model, weights)


def test_whole_checkpoints_are_no_lora(file, tmp_path):
    with pytest.raises(CheckpointError, match="a whole PixArt transformer, no LoRA"):
        load_adapter(file)
    with pytest.raises(CheckpointError, match="VAE.*no LoRA"):
        load_adapter(save({"decoder.conv_in.weight": torch.randn(2)}, tmp_path))


def test_pickles_with_code_are_not_loaded(tmp_path):
    torch.save({"lora": print, "a.lora_up.weight": torch.randn(2)}, tmp_path / "style.pt")
    with pytest.raises(CheckpointError, match="could run code"):
        load_adapter(tmp_path / "style.pt")
