"""Adapters saved by the PEFT library itself, against its own merge, on diffusers' transformer."""
from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import Linear

peft = pytest.importorskip("peft")
pytest.importorskip("diffusers")

from pixart.adapters import fit_adapter, load_adapter, merge_layers, parameter_shapes
from pixart.adapters.rotation import Rotation, rotated
from pixart.adapters.settings import settings_from_config
from pixart.checkpoints import load_transformer
from pixart.errors import CheckpointError, UnsupportedError
from tests.support import checkpoint_factory as factory

CONFIG = factory.diffusers_config(hidden=72, depth=2)
TARGETS = ["attn1.to_q", "attn1.to_v", "attn2.to_k", "attn2.to_out.0", "ff.net.0.proj", "adaln_single.linear", "proj_out"]
OFFICIAL = [
    "to_k", "to_q", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "proj", "linear", "linear_1", "linear_2"
]  # fmt: skip
SOME = {"transformer_blocks.1.attn1.to_v": 3, "attn2.to_k": 5}
CASES = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=2, target_modules=TARGETS),
    "patterns": lambda: peft.LoraConfig(
        r=4, lora_alpha=6, rank_pattern=SOME, alpha_pattern={**SOME, "proj_out": 1}, target_modules=TARGETS
    ),
    "rank-stabilized": lambda: peft.LoraConfig(r=9, lora_alpha=2, use_rslora=True, target_modules=TARGETS),
    "dora": lambda: peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=TARGETS),
    "bias": lambda: peft.LoraConfig(r=4, lora_alpha=2, lora_bias=True, target_modules=["attn1.to_v", "attn1.to_out.0"]),
    "loha": lambda: peft.LoHaConfig(r=4, alpha=6, target_modules=TARGETS),
    "lokr": lambda: peft.LoKrConfig(r=2, alpha=3, target_modules=TARGETS),
    "lokr-whole": lambda: peft.LoKrConfig(r=64, alpha=32, target_modules=TARGETS),
    "loha-tucker": lambda: peft.LoHaConfig(r=3, alpha=6, use_effective_conv2d=True, target_modules=[*TARGETS, "pos_embed.proj"]),
    "lokr-tucker": lambda: peft.LoKrConfig(
        r=2, alpha=3, use_effective_conv2d=True, decompose_both=True, target_modules=[*TARGETS, "pos_embed.proj"]
    ),
    "modules-to-save": lambda: peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["attn1.to_q", "attn1.to_v"], modules_to_save=["proj_out", "caption_projection", "attn2.to_k"]
    ),
    "biases-of-layers": lambda: peft.LoraConfig(r=4, lora_alpha=2, bias="lora_only", target_modules=TARGETS),
    "biases": lambda: peft.LoraConfig(r=4, lora_alpha=2, bias="all", use_dora=True, target_modules=TARGETS),
    "biases-and-modules-to-save": lambda: peft.LoraConfig(
        r=4, lora_alpha=2, bias="all", target_modules=["attn1.to_q"], modules_to_save=["proj_out", "caption_projection", "attn2.to_k"]
    ),
    # The targets and options of PixArt's own training script
    "dora-official": lambda: peft.LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", use_dora=True, target_modules=OFFICIAL),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, target_modules=TARGETS),
    "oft-inverse": lambda: peft.OFTConfig(oft_block_size=8, use_cayley_neumann=False, bias="oft_only", target_modules=TARGETS),
    "oft-shared": lambda: peft.OFTConfig(oft_block_size=4, block_share=True, num_cayley_neumann_terms=3, target_modules=TARGETS),
    "oft-bounded": lambda: peft.OFTConfig(oft_block_size=4, coft=True, eps=0.5, target_modules=TARGETS),
    "boft": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=[*TARGETS, "pos_embed.proj"]),
    "ia3": lambda: peft.IA3Config(
        target_modules=["attn1.to_k", "attn2.to_v", "ff.net.2", "proj_out", "pos_embed.proj"], feedforward_modules=["ff.net.2"]
    ),
}


def randomized(config):
    """diffusers' model with a PEFT adapter whose matrices are all random."""
    model = peft.get_peft_model(factory.reference_model(CONFIG), config)
    order = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            size = 1.0 if any(part in name for part in ("magnitude", "boft_s", "ia3_l")) else 0.0
            parameter.data = size + 0.2 * torch.randn(parameter.shape, generator=order)
    return model


def ours(tmp_path):
    """The same base model, from a file, and the place of the adapter."""
    diffusers = factory.reference_model(CONFIG).state_dict()
    path = factory.write("safetensors", tmp_path / "model", CONFIG, diffusers, factory.original_keys(diffusers, 2))
    return load_transformer(path)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_a_folder_of_peft_merges_as_peft_merges_it(case, tmp_path):
    adapted = randomized(CASES[case]())
    adapted.save_pretrained(tmp_path / "adapter")
    expected = factory.original_keys(adapted.merge_and_unload().state_dict(), 2)
    model = ours(tmp_path)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fit = fit_adapter(load_adapter(tmp_path / "adapter"), parameter_shapes(model))
    merge_layers(model, fit.layers, 1.0)
    assert all(".original_module." in key for key in fit.left) and len(fit.layers) >= 4
    changed = 0
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5)
        changed += not torch.equal(value, before[key])
    assert changed >= 4


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["default", "", "style"])
def test_biases_stored_twice_are_one_whatever_the_adapter_is_called(name, tmp_path):
    """Older versions of PEFT leave the adapter's name out everywhere."""
    adapted = randomized(CASES["biases-and-modules-to-save"]())
    adapted.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    part = f"modules_to_save.{name}." if name else "modules_to_save."
    tensors = {key.replace("modules_to_save.default.", part): value for key, value in load_file(file).items()}
    save_file(tensors, file)
    expected = factory.original_keys(adapted.merge_and_unload().state_dict(), 2)
    model = ours(tmp_path)
    fit = fit_adapter(load_adapter(tmp_path / "adapter"), parameter_shapes(model))
    merge_layers(model, fit.layers, 1.0)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5)
    assert fit.describe().startswith(f"adapter: {len(tensors) - len(fit.left)} of {len(tensors)} keys applied")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("other", [lambda t: t + 1e-3, lambda t: t.half(), lambda t: t[None], lambda t: torch.full_like(t, torch.nan)])
def test_biases_stored_twice_that_differ_are_refused(other, tmp_path):
    randomized(CASES["biases-and-modules-to-save"]()).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.proj_out.modules_to_save.bias"
    save_file({**tensors, key: other(tensors[key])}, file)
    with pytest.raises(CheckpointError, match=r"(?s)damaged, 1 problem.*proj_out.*are the same matrix; expected one adapter in a file"):
        load_adapter(tmp_path)


def test_the_file_inside_the_folder_and_diffusers_header_say_the_same(tmp_path):
    """alpha stands in adapter_config.json, or in the header that diffusers writes."""
    adapted = randomized(CASES["patterns"]())
    adapted.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    renamed = {key.replace("base_model.model.", "transformer."): value for key, value in tensors.items()}
    header = json.dumps({f"transformer.{key}": value for key, value in config.items()})
    save_file(renamed, tmp_path / "diffusers.safetensors", metadata={"lora_adapter_metadata": header})
    scales = [
        {layer.place: layer.scale for layer in load_adapter(path).layers}
        for path in (tmp_path / "adapter", tmp_path / "adapter/adapter_model.safetensors", tmp_path / "diffusers.safetensors")
    ]
    save_file(renamed, tmp_path / "plain.safetensors", metadata={"lora_adapter_metadata": json.dumps(config)})
    scales.append({layer.place: layer.scale for layer in load_adapter(tmp_path / "plain.safetensors").layers})
    assert scales[0] == scales[1] == scales[2] == scales[3]
    assert len(set(scales[0].values())) > 2
    save_file(tensors, tmp_path / "alone.safetensors")  # without either, alpha is the rank
    assert {layer.scale for layer in load_adapter(tmp_path / "alone.safetensors").layers} == {1.0}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "VERA"}, "type VERA"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is true"),
        ({"peft_type": "OFT", "oft_block_size": 4, "peft_version": "0.17.1"}, "PEFT before 0.18"),
        ({"peft_type": "OFT", "r": 8, "use_cayley_neumann": False}, "PEFT before 0.18"),
        ({"target_parameters": ["scale_shift_table"]}, "target_parameters is .'scale_shift_table'."),
        ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base model's own weights"),
        ({"alpha_pattern": {"(a+)+$": 1}}, "pattern"),
    ],
)
def test_methods_that_only_peft_can_run_are_refused(config, message):
    with pytest.raises(UnsupportedError, match=message):
        settings_from_config({"r": 4, "lora_alpha": 4, **config}, "x")


def test_damaged_settings_are_named():
    with pytest.raises(CheckpointError, match="lora_alpha is 'much'"):
        settings_from_config({"r": 4, "lora_alpha": "much"}, "x")
    for patterns in (["to_q"], "to_q", 3):
        with pytest.raises(CheckpointError, match="rank_pattern is a (list|str|int); expected an object"):
            settings_from_config({"r": 4, "rank_pattern": patterns}, "x")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_rslora": "false"}, "use_rslora is 'false'; expected true or false"),
        ({"use_dora": 0}, "use_dora is 0; expected true or false"),
        ({"r": 0}, "r is 0; expected a rank of at least 1"),
        ({"rank_pattern": {"to_q": -4}}, "to_q is -4; expected a rank of at least 1"),
    ],
)
def test_settings_that_would_be_taken_for_something_else(config, message):
    with pytest.raises(CheckpointError, match=f"x: {message}"):
        settings_from_config({"r": 4, "lora_alpha": 4, **config}, "x")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_dora_without_magnitudes_is_refused(tmp_path):
    """Applied as a plain LoRA it would be another picture."""
    randomized(CASES["dora"]()).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(file).items() if "magnitude" not in key or "to_v" in key}, file)
    with pytest.raises(CheckpointError, match=r"(?s)damaged.*attn1.to_q: its settings say DoRA, but the magnitude is missing"):
        load_adapter(tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_oft_of_the_patch_embedding_is_refused(tmp_path):
    """PEFT folds overlapping patches there: what was trained is no weight, and its own merge draws another picture."""
    randomized(peft.OFTConfig(oft_block_size=4, target_modules=["to_q", "pos_embed.proj"])).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match=r"(?s)1 layer.*pos_embed.proj: OFT of PEFT on a convolution"):
        load_adapter(tmp_path)


def test_folders_without_weights_or_config_are_named(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="found adapter_config.json; expected a PEFT folder"):
        load_adapter(tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("stages", [1, 3])
def test_butterflies_of_several_stages(stages):
    """PEFT trains them on a card only; its own permutations tell here which columns each stage mixes."""
    size, number, columns = 4, 8, 32
    order = torch.Generator().manual_seed(0)
    parameters, weight = 0.3 * torch.randn(stages, number, size, size, generator=order), torch.randn(5, columns, generator=order)
    config = peft.BOFTConfig(boft_block_size=size, target_modules=["0"])
    theirs = peft.get_peft_model(torch.nn.Sequential(Linear(columns, 5)), config).base_model.model[0]
    turn = torch.eye(columns)
    for stage, blocks in enumerate(parameters):
        gather = theirs.perm2mat(theirs.block_butterfly_perm(columns, number // 2**stage, size // 2, stages - 1))
        turn = gather @ torch.block_diag(*theirs.cayley_batch(blocks)) @ gather.T @ turn
    torch.testing.assert_close(rotated(weight, {"boft_R": parameters}, Rotation()), weight @ turn.T, rtol=1e-4, atol=1e-5)
