"""Every format of LoRA against sums done by hand; what fits and what doesn't; broken and foreign files."""
from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from pixart.adapters import fit_adapter, load_adapter, merge_layers, parameter_shapes
from pixart.checkpoints import load_transformer
from pixart.errors import CheckpointError, UnsupportedError
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


UP_AND_DOWN = {"lora_up.weight": torch.ones(144, 4), "lora_down.weight": torch.ones(4, 144)}


def matrices(module, change=1.0, ends=UP_AND_DOWN):
    return {f"{module}.{end}": change * tensor for end, tensor in ends.items()}


STRAY = {
    "other blocks": (  # the model has two
        {k: t for i in (7, 8) for k, t in matrices(f"lora_transformer_transformer_blocks_{i}_attn1_to_q").items()},
        "4 for layers that this model doesn't have, or keeps quantized: lora_transformer_transformer_blocks_*_attn1_to_q.lora_down.weight "
        "(2 times)",
    ),
    "T5": (
        {k: t for i in range(3) for k, t in matrices(f"lora_te_encoder_block_{i}_layer_0_SelfAttention_q").items()},
        "6 for T5, and no text encoder is given: lora_te_encoder_block_*_layer_0_SelfAttention_q.lora_down.weight (3 times)",
    ),
    "CLIP": (
        {"lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": torch.ones(1)},
        "1 for another text encoder than T5: lora_te1_text_model_encoder_layers_*_mlp_fc1.alpha",
    ),
    "another model": (matrices("lora_unet_mid_block_attentions_0"), "2 no layer of PixArt: lora_unet_mid_block_attentions_0"),
    "GLoRA": (
        {f"lycoris_blocks_1_mlp_fc2.{end}": torch.ones(2, 2) for end in ("a1.weight", "a2.weight", "b1.weight", "b2.weight")}
        | {"lycoris_blocks_1_mlp_fc2.alpha": torch.ones(1)},
        "5 of GLoRA, which is not supported: lycoris_blocks_*_mlp_fc2.a1.weight",
    ),
    "VeRA": ({"base_model.model.proj_out.vera_lambda_b": torch.ones(2)}, "1 of VeRA, which is not supported"),
    "FourierFT": ({"base_model.model.proj_out.fourierft_spectrum": torch.ones(2)}, "1 of FourierFT, which is not supported"),
    "old OFT": ({"base_model.model.proj_out.oft_r": torch.ones(2, 4, 4)}, "1 of OFT of PEFT before 0.16, which is not supported"),
    "bundled embedding": ({"bundle_emb.<me>.t5_out": torch.ones(2)}, "embeddings bundled by OneTrainer"),
    "fp8 with scales": ({"lora_transformer_proj_out.scale_weight": torch.ones(1)}, "1 of scaled fp8, which is not supported"),
    "unknown": ({"lora_transformer_proj_out.something": torch.ones(1)}, "1 of no supported kind: lora_transformer_proj_out.something"),
}


@pytest.mark.parametrize("case", STRAY)
def test_one_stray_key_refuses_the_whole_adapter_and_is_named(case, model, weights, tmp_path):
    """A part of an adapter is another picture than the one it was trained for."""
    stray, message = STRAY[case]
    sample = adapter_factory.make("onetrainer", weights)
    total = len(sample.tensors) + len(stray)
    with pytest.raises(CheckpointError, match=rf"{len(stray)} of {total} keys can't be applied, so none was") as raised:
        merge(save({**sample.tensors, **stray}, tmp_path), model)
    assert message in str(raised.value) and "\n" not in str(raised.value)
    assert_equal(model, weights)


HARMLESS = {
    "zero": (
        matrices("lora_te1_text_model_encoder_layers_0_mlp_fc1", 0.0) | matrices("lora_unet_blocks_9_attn_qkv", 0.0),
        "4 for layers that this model doesn't have, all zero",
    ),
    "positions": ({"transformer.pos_embed.pos_embed": torch.ones(1, 4, 144)}, "1 positions, which are computed"),
    "quantized copies": (
        {f"proj_out.base_layer.weight.{end}": torch.ones(2) for end in ("absmax", "quant_map", "quant_state.bitsandbytes__nf4")},
        "3 copies of the base model's own weights",
    ),
    "originals": ({"base_model.model.proj_out.original_module.weight": torch.ones(2, 2)}, "1 copies of the base model's own weights"),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_what_changes_nothing_may_lie_beside_and_is_told(case, model, weights, tmp_path):
    stray, message = HARMLESS[case]
    sample = adapter_factory.make("onetrainer", weights)
    fit = merge(save({**sample.tensors, **stray}, tmp_path), model)
    assert_equal(model, sample.merged(weights, 1.0))
    assert set(fit.left) == set(stray) and f"; not applied: {message}" in fit.describe()


def test_tables_are_changed_like_layers(model, weights, tmp_path):
    """ComfyUI names a difference of a parameter after it; a trainer may store it whole, under either layout's name."""
    tables = ["blocks.0.scale_shift_table", "blocks.1.scale_shift_table", "final_layer.scale_shift_table", "y_embedder.y_embedding"]
    changed = {key: torch.randn_like(weights[key]) for key in tables}
    up, down = torch.randn(6, 2), torch.randn(2, 144)
    tensors = {
        "diffusion_model.blocks.0.scale_shift_table.diff": changed[tables[0]],
        "diffusion_model.blocks.1.scale_shift_table.lora_up.weight": up,
        "diffusion_model.blocks.1.scale_shift_table.lora_down.weight": down,
        "transformer.scale_shift_table": changed[tables[2]],
        "diffusion_model.y_embedder.y_embedding.set_weight": changed[tables[3]],
    }
    merge(save(tensors, tmp_path), model, 0.5)
    expected = {**weights, tables[0]: weights[tables[0]] + changed[tables[0]] / 2, tables[1]: weights[tables[1]] + up @ down / 2}
    assert_equal(model, expected | {key: (weights[key] + changed[key]) / 2 for key in tables[2:]})


def test_biases_are_changed_with_their_layers(model, weights, tmp_path):
    """A piece of a fused one, one for all of it, and one by itself."""
    key, piece, whole = "blocks.0.attn.qkv.bias", torch.randn(144), torch.randn(144)
    zero = {"lora_B.weight": torch.zeros(144, 2), "lora_A.weight": torch.ones(2, 144)}
    tensors = matrices("transformer.transformer_blocks.0.attn1.to_k", ends=zero)
    tensors |= {"transformer.transformer_blocks.0.attn1.to_k.diff_b": piece, "diffusion_model.blocks.1.attn.proj.bias": whole}
    merge(save(tensors, tmp_path), model, -1.0)
    expected = {**weights, key: weights[key].clone(), "blocks.1.attn.proj.bias": 2 * weights["blocks.1.attn.proj.bias"] - whole}
    expected[key][144:288] -= piece
    assert_equal(model, expected)


NAMES = {
    "torch.compile": "transformer._orig_mod.transformer_blocks.0._orig_mod.attn1.to_out.0",
    "DDP, checkpoints": "module.transformer_blocks.0._checkpoint_wrapped_module.attn1.to_out.0",
    "early diffusers": "unet.transformer_blocks.0.attn1.processor.to_out",
    "kohya": "lora_unet_blocks_0_attn_proj",
    "LyCORIS of diffusers": "lycoris_transformer_blocks_0_attn1_to_out_0",
    "SimpleTuner in 2024": "transformer.base_model.model.transformer_blocks.0.attn1.to_out.0",
    "ComfyUI": "model.diffusion_model.blocks.0.attn.proj",
}


@pytest.mark.parametrize("name", NAMES)
def test_names_of_every_trainer_find_their_layer(name, model, weights, tmp_path):
    up, down = torch.randn(144, 2), torch.randn(2, 144)
    ends = ("_lora.up.weight", "_lora.down.weight") if "early" in name else (".lora_up.weight", ".lora_down.weight")
    merge(save({NAMES[name] + ends[0]: up, NAMES[name] + ends[1]: down}, tmp_path), model)
    assert_equal(model, {**weights, "blocks.0.attn.proj.weight": weights["blocks.0.attn.proj.weight"] + up @ down})


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16])
def test_adapters_stored_in_few_bits(dtype, model, weights, tmp_path):
    sample = adapter_factory.make("kohya-split", weights)
    stored = {key: tensor if key.endswith("alpha") else tensor.to(dtype) for key, tensor in sample.tensors.items()}
    merge(save(stored, tmp_path), model)
    widened = save({key: tensor.float() for key, tensor in stored.items()}, tmp_path, "wide.safetensors")
    merge(widened, model, -1.0)
    assert_equal(model, weights)


def test_alpha_may_be_a_plain_number(model, weights, tmp_path):
    sample = adapter_factory.make("kohya-fused", weights)
    torch.save({key: float(t) if key.endswith("alpha") else t for key, t in sample.tensors.items()}, tmp_path / "style.pt")
    merge(tmp_path / "style.pt", model)
    assert_equal(model, sample.merged(weights, 1.0))


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
    "up missing": ({"blocks.0.attn.proj.lora_down.weight": torch.randn(2, 144)}, "lora_up is missing"),
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
        "alpha is not a finite number",
    ),
    "rank 0": (
        {"blocks.0.attn.proj.lora_down.weight": torch.zeros(0, 144), "blocks.0.attn.proj.lora_up.weight": torch.zeros(144, 0)},
        r"rank 0, or no values: lora_down \(0, 144\), lora_up \(144, 0\)",
    ),
    "two adapters": (
        {f"blocks.0.attn.proj.lora_{side}.{name}.weight": torch.randn(144, 144) for side in "AB" for name in ("default", "other")},
        "lora_A.default.weight and .*lora_A.other.weight are the same matrix",
    ),
    "two methods": (
        {
            "blocks.0.attn.proj.lora_down.weight": torch.randn(2, 144), "blocks.0.attn.proj.lora_up.weight": torch.randn(144, 2),
            "blocks.0.attn.proj.hada_w1_a": torch.randn(144, 2),
        },
        "matrices of (LoRA and LoHa|LoHa and LoRA) together",
    ),
    "no blocks": ({"blocks.0.attn.proj.rescale": torch.ones(144, 1)}, "oft_blocks' is missing"),
    "blocks of another size": ({"blocks.0.attn.proj.oft_blocks": torch.randn(2, 7, 7)}, "another model.*oft_blocks"),
    "new size": (
        {
            "blocks.0.attn.proj.lora_down.weight": torch.randn(2, 144), "blocks.0.attn.proj.lora_up.weight": torch.randn(144, 2),
            "blocks.0.attn.proj.reshape_weight": torch.tensor([144, 288]),
        },
        "makes the weight 144 x 288 large, it has 144 x 144",
    ),
    "bias": ({"blocks.0.attn.proj.diff_b": torch.randn(5)}, "5 numbers for a bias of 144"),
    "whole": ({"blocks.0.attn.proj.set_weight": torch.randn(288, 144)}, "has 288 x 144 numbers, the weight has 144 x 144"),
    "alone": ({"blocks.0.attn.proj.alpha": torch.tensor(1.0)}, "only alpha is there"),
    "twice": ({f"{p}blocks.0.attn.proj.diff": torch.randn(144, 144) for p in ("", "transformer.")}, "change the same weight"),
    "magnitude": (
        {"blocks.0.mlp.fc1.diff": torch.randn(576, 144), "blocks.0.mlp.fc1.dora_scale": torch.ones(5, 1)},
        r"magnitude has shape \(5, 1\)",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_damaged_files_are_refused_whole(case, model, weights, tmp_path):
    tensors, message = BROKEN[case]
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        merge(save({**adapter_factory.make("difference", weights).tensors, **tensors}, tmp_path), model)
    assert_equal(model, weights)


@pytest.mark.parametrize("norm", [0.5, 3.0])
def test_a_bound_of_oft_that_means_two_things_is_refused_where_it_counts(norm, model, weights, tmp_path):
    """ComfyUI's names, but blocks as only kohya makes them: alpha 1 is the largest norm, or 144 times as much."""
    blocks = torch.randn(2, 72, 72)
    blocks *= norm / (blocks - blocks.mT).norm()
    tensors = {"diffusion_model.blocks.0.attn.proj.oft_blocks": blocks, "diffusion_model.blocks.0.attn.proj.alpha": torch.tensor(1.0)}
    tensors["diffusion_model.blocks.0.attn.proj.diff_b"] = torch.randn(144)
    path = save(tensors, tmp_path)
    if norm > 1:
        with pytest.raises(UnsupportedError, match="alpha of 1 limits either the whole norm, here 3"):
            merge(path, model)
        assert_equal(model, weights)
    else:
        assert merge(path, model).describe().endswith("3 of 3 keys applied (1 layers, OFT)")


def test_methods_that_are_not_known_are_named(tmp_path):
    for end, name in (("a1.weight", "GLoRA"), ("vera_lambda_d", "VeRA"), ("hra_u", "HRA"), ("lambda_layer", "T-LoRA")):
        with pytest.raises(CheckpointError, match=f"{name}, which is not supported.*expected LoRA, LoHa, LoKr, DoRA, OFT"):
            load_adapter(save({f"lycoris_blocks_0_attn_qkv.{end}": torch.randn(2, 2)}, tmp_path))


def test_oft_in_triangles_needs_its_settings(tmp_path):
    """OneTrainer writes PEFT's tensors without PEFT's settings."""
    tensors = {"transformer.transformer_blocks.0.attn1.to_k.oft_R.weight": torch.randn(36, 6)}
    with pytest.raises(UnsupportedError, match="OFT of PEFT or OneTrainer without its adapter_config.json"):
        load_adapter(save(tensors, tmp_path))


def test_pieces_of_kohyas_oft_are_refused(model, weights, tmp_path):
    tensors = {f"oft_unet_blocks_0_attn_qkv.oft_blocks.{i}": torch.randn(36, 4, 4) for i in range(3)}
    with pytest.raises(CheckpointError, match="2 of 3 keys can't be applied.*of no supported kind: .*oft_blocks"):
        merge(save(tensors, tmp_path), model)
    assert_equal(model, weights)


def test_integers_without_a_scale_are_refused(tmp_path):
    stored = {key: tensor.char() for key, tensor in matrices("blocks.0.attn.proj").items()}
    with pytest.raises(UnsupportedError, match="stored as integers .lora_down torch.int8, lora_up torch.int8"):
        load_adapter(save(stored, tmp_path))


def test_whole_checkpoints_are_no_lora(file, tmp_path):
    with pytest.raises(CheckpointError, match="a whole PixArt transformer, not a LoRA"):
        load_adapter(file)
    with pytest.raises(CheckpointError, match="VAE.*not a LoRA"):
        load_adapter(save({"decoder.conv_in.weight": torch.randn(2)}, tmp_path))


def test_pickles_with_code_are_not_loaded(tmp_path):
    torch.save({"lora": print, "a.lora_up.weight": torch.randn(2)}, tmp_path / "style.pt")
    with pytest.raises(CheckpointError, match="could run code"):
        load_adapter(tmp_path / "style.pt")
