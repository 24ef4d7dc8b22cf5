"""What methods begin from: a base in any layout, of any variant, moved from alpha to Sigma; and what no run can begin with."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("diffusers")

from pixart.adapters import load_adapter
from pixart.checkpoints import inspect_file, load_transformer
from pixart.config import Variant, get_variant, variant_names
from pixart.training.loop import Loop
from pixart.training.methods import lora
from pixart.training.recipe import make_recipe
from pixart.training.sources import scenes
from tests.support import checkpoint_factory as factory
from tests.support.tiny_methods import CONFIG, built, inputs, recipe_of, use_variant, write_base
from tests.support.tiny_training import TwoPictures, recipe_values

LORA = {"name": "lora", "rank": 4, "targets": "all", "save_dtype": "fp32"}


@pytest.mark.parametrize("kind", ["pth", "pth-ema", "diffusers-folder", "pipeline-folder"])
@pytest.mark.parametrize("micro", [False, True])
def test_weak_to_strong_an_alpha_begins_a_sigma(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, micro: bool) -> None:
    """Its VAE is of no matter to the weights; the size embedders and the null caption of 120 rows are left out."""
    use_variant(monkeypatch)
    base = write_base(tmp_path / "alpha", kind, micro=micro, null_rows=120, pixels=1024 if micro else 256, position_range=32 if micro else 16)
    method, network, _ = built(recipe_of(tmp_path, base, "full"), move=0)
    start = load_transformer(base, ema=kind == "pth-ema").state_dict()
    if kind == "pth-ema":
        start = {name: torch.zeros_like(value) for name, value in start.items()}  # what the factory keeps beside the average
    kept = network.state_dict()
    assert kept.keys() == {name for name in start if not name.startswith(("csize", "ar_", "y_embedder.y_embedding"))}
    assert all(torch.equal(value, start[name]) for name, value in kept.items())
    assert network.config.position_range == 32 and not network.config.micro_condition and method.null_rows(network) is None
    method.write(network, {}, tmp_path / "sigma.safetensors", {})
    detection = inspect_file(tmp_path / "sigma.safetensors")
    assert (detection.family, detection.family_known, detection.vae, detection.latent_scale) == ("sigma", True, "sdxl", 0.13025)


def test_stored_positions_are_computed_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """256 -> 1024: the same weights, whatever table the file brings."""
    use_variant(monkeypatch)
    _, _, original = factory.tiny_weights(hidden=72, depth=2, captions=8)
    base = tmp_path / "small.pth"
    torch.save({"state_dict": {**original, "pos_embed": factory.stored_positions(16, 72, 16)}}, base)
    _, network, _ = built(recipe_of(tmp_path, base, "full"), move=0)
    assert torch.equal(network.y_embedder.y_embedding, original["y_embedder.y_embedding"])
    large = write_base(tmp_path / "large")
    with torch.no_grad():
        torch.testing.assert_close(network(*inputs()), load_transformer(large)(*inputs()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in variant_names() if name != "demo"])
def test_every_variant_trains_and_is_known_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """With its own latents, tokens and size embedders, and 900M with its own depth; only narrower."""
    real = get_variant(name)
    depth = real.transformer.depth if name == "sigma-900m" else 2
    narrow = replace(real.transformer, hidden_size=72, num_heads=1, mlp_hidden=144, caption_channels=8, depth=depth)
    variant = Variant(real.name, "narrow", real.family, real.base_size, real.max_tokens, real.latent_scale, real.vae, narrow)
    use_variant(monkeypatch, variant)

    class Pictures(TwoPictures):
        def batch(self, settings, stage, draws):
            made = super().batch(settings, stage, draws)
            return replace(made, latent=made.latent.repeat(1, narrow.in_channels // 4, 1, 1))

    monkeypatch.setattr(scenes, "Part", Pictures)
    stages = [{"base_size": 64, "steps": 1, "batch_size": 2, "learning_rate": 1e-3}]
    values = recipe_values(tmp_path, variant=name, stages=stages)
    Loop(make_recipe(values, "r")).run()
    out = tmp_path / "out.safetensors"
    detection = inspect_file(out)
    assert (detection.family, detection.base_size, detection.vae, detection.family_known) == (real.family, real.base_size, real.vae, True)
    assert detection.config.position_range == real.transformer.position_range and detection.config.depth == depth
    adapted = {"initialize": str(out), "output": str(tmp_path / "l.safetensors"), "run_dir": str(tmp_path / "lora")}
    blocks = [0, depth - 1]
    Loop(make_recipe({**values, **adapted, "method": {"name": "lora", "rank": 2, "blocks": blocks}}, "r")).run()
    assert len(load_adapter(tmp_path / "l.safetensors").layers) == 5 * len(blocks)


# -- bad recipes ---------------------------------------------------------------------------------

BAD = {
    "an unknown kind": ({"kind": "oft"}, "method lora: kind is 'oft'; expected one of lora, dora, lokr, loha"),
    "rank 0": ({"rank": 0}, "rank is 0 and text_rank 0; expected 1 or more"),
    "alpha 0": ({"alpha": 0}, "alpha is 0; expected a number above 0, or null for the rank"),
    "an unknown preset": ({"targets": "everything"}, "targets is 'everything'; expected attention, attention.mlp, all, or a list"),
    "a layer that isn't there": ({"targets": ["attn.to_q"]}, r"names attn.to_q, but this model has no linear layer of that name; expected some of t_embedder.mlp.0, .*attn.qkv, attn.proj"),
    "a block that isn't there": ({"blocks": [0, 7]}, "blocks has 7; this model has the blocks 0 to 1"),
    "no block": ({"blocks": []}, "leave no layer to train"),
    "an unknown base": ({"base": "int8"}, "base is 'int8'; expected one of fp32, bf16, fp16, fp8, nf4, or null"),
    "a base that the run doesn't compute in": ({"base": "bf16"}, "base is 'bf16', which needs the precision 'bf16' too"),
    "all dropped": ({"dropout": 1}, "dropout is 1; expected 0 to below 1"),
    "rsLoRA of LoKr": ({"kind": "lokr", "rank_stabilized": True}, "lokr has no such form"),
    "a factor of a LoRA": ({"factor": 4}, "factor is 4 for the kind 'lora'"),
    "a folder of a LoKr": ({"kind": "lokr", "peft_folder": True}, "asked for a LoKr, whose products don't split"),
    "an unknown dtype": ({"save_dtype": "fp8"}, "save_dtype is 'fp8'; expected one of fp32, bf16, fp16"),
    "T5 of nowhere": ({"text_rank": 2}, "set source.text_encoder"),
    "a part that isn't a number": ({"rank": "16"}, "rank is '16'; expected a whole number"),
}


@pytest.mark.parametrize("case", BAD)
def test_adapters_that_can_not_be(tmp_path: Path, base: Path, case: str) -> None:
    changes, message = BAD[case]
    with pytest.raises(ValueError, match=message) as caught:
        built(recipe_of(tmp_path, base, {"name": "lora", **changes}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("lora", {"initialize": None}, "Method lora needs finished weights to start from"),
        ({"name": "full", "layout": "onnx"}, {}, "layout is 'onnx'; expected one of original, diffusers"),
        ({"name": "kv", "blocks": [[0, 2]], "layout": "diffusers"}, {}, "diffusers has no KV compression"),
        ({"name": "kv", "blocks": [[0, 2]], "mode": "mean"}, {}, "mode is 'mean'; expected one of conv, uniform"),
        ({"name": "kv"}, {}, "blocks is empty; expected pairs"),
        ({"name": "controlnet", "blocks": 0}, {}, "blocks is 0; expected the number of blocks to copy"),
        ("full", {"objective": {"name": "denoise", "min_snr": 0}}, "min_snr is 0; expected a number above 0"),
        ("full", {"objective": {"name": "imitate", "imitate_weight": 0}}, "imitate_weight is 0 and denoise_weight 0.0; expected above 0"),
        ("full", {"objective": {"name": "denoise", "variance_weight": float("nan")}}, "variance_weight is nan; expected 0 or more"),
        ("full", {"stages": [{"base_size": 64, "steps": 1, "batch_size": 1, "learning_rate": 1, "objective": {"timesteps": "cosine"}}]},
         "stages.0.objective, objective denoise: timesteps is 'cosine'; expected 'uniform' or 'logit_normal'"),
    ],
)  # fmt: skip
def test_recipes_that_can_not_be(tmp_path: Path, base: Path, method: Any, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        built(recipe_of(tmp_path, changes.pop("initialize", base), method, **changes))


def test_a_base_of_another_model_is_named(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deeper = write_base(tmp_path / "deeper", depth=3)
    with pytest.raises(ValueError, match=r"model.safetensors is another model than the recipe's variant: depth 3 instead of 2"):
        built(recipe_of(tmp_path, deeper, "lora"))
    alpha = write_base(tmp_path / "alpha", micro=True, null_rows=120)
    with pytest.raises(ValueError, match="micro_condition True instead of False"):
        built(recipe_of(tmp_path, alpha, {"name": "controlnet", "blocks": 1}))


def test_an_alpha_is_no_base_of_a_sigmas_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their layers are alike: the file's null caption tells."""
    alpha = write_base(tmp_path / "alpha", null_rows=120)
    monkeypatch.setattr(lora.full, "get_variant", lambda name: replace(get_variant("sigma-512"), transformer=CONFIG))
    recipe = replace(recipe_of(tmp_path, alpha, "lora"), variant="sigma-512")
    with pytest.raises(ValueError, match=r"y_embedding has 120 rows, that is alpha; sigma-512 has 300"):
        built(recipe)


@pytest.mark.parametrize("method", ["full", "lora", "text", "packed", "controlnet", "kv"])
def test_a_dry_run_builds_the_network_without_numbers(tmp_path: Path, base: Path, method: str) -> None:
    chosen = {
        "text": {**LORA, "text_rank": 2}, "packed": {**LORA, "base": "nf4"}, "lora": LORA,
        "controlnet": {"name": "controlnet", "blocks": 1}, "kv": {"name": "kv", "blocks": [[1, 2]]},
    }.get(method, "full")  # fmt: skip
    source = {"name": "scenes", "text_encoder": ""}
    if method == "text":
        pytest.importorskip("sentencepiece")
        from tests.support.tiny_text import save_t5_file, tiny_t5

        source["text_encoder"] = str(save_t5_file(tiny_t5(width=8), tmp_path / "t5.safetensors"))
    recipe = recipe_of(tmp_path, base, chosen, source=source)
    with torch.device("meta"):
        network = recipe.method.make(recipe).build(TwoPictures(recipe.source.settings, recipe), torch.device("meta"))
    assert {value.device.type for value in (*network.parameters(), *network.buffers())} == {"meta"}
    trained = {name: value.shape for name, value in network.named_parameters() if value.requires_grad}
    _, built_network, averages = built(recipe)
    assert trained == {name: value.shape for name, value in averages.items()}
