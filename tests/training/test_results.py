"""What methods write is what they trained: read again by this package, by PEFT on diffusers, and by nothing else by mistake."""
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

peft = pytest.importorskip("peft")
diffusers = pytest.importorskip("diffusers")

from pixart.adapters import merge_file
from pixart.checkpoints import inspect_file, load_transformer
from pixart.checkpoints.controlnet import load_controlnet
from pixart.controlnet import ControlledTransformer
from pixart.training.results import content_hash, without_places
from tests.support import checkpoint_factory as factory
from tests.support import training_reference as reference
from tests.support.tiny_methods import built, inputs, recipe_of, write_base

ADAPTERS = {
    "lora": {}, "alpha": {"alpha": 5}, "rslora": {"rank": 9, "alpha": 2, "rank_stabilized": True}, "dora": {"kind": "dora", "alpha": 2},
    "loha": {"kind": "loha", "alpha": 3}, "lokr": {"kind": "lokr", "rank": 2, "alpha": 3}, "lokr-whole": {"kind": "lokr", "rank": 64, "alpha": 32},
    "lokr-factor": {"kind": "lokr", "rank": 2, "factor": 4},
}  # fmt: skip


def adapter(name: str, **changes: Any) -> dict[str, Any]:
    return {"name": "lora", "rank": 4, "targets": "all", "save_dtype": "fp32", **ADAPTERS[name], **changes}


def metadata(path: Path) -> dict[str, str]:
    with safe_open(str(path), framework="pt") as opened:
        return opened.metadata()


@pytest.mark.parametrize("name", ADAPTERS)
@torch.no_grad()
def test_an_adapter_read_again_predicts_as_the_trained_network(tmp_path: Path, base: Path, name: str) -> None:
    method, network, averages = built(recipe_of(tmp_path, base, adapter(name)))
    method.write(network, averages, tmp_path / "style.safetensors", {"step": "3"})
    model = load_transformer(base)
    plain = model(*inputs())
    fit = merge_file(tmp_path / "style.safetensors", 1.0, model, None)
    assert not fit.left and len(fit.layers) == len(network.blocks) * 7 + 6
    torch.testing.assert_close(model(*inputs()), network(*inputs()), rtol=1e-5, atol=1e-5)
    assert (model(*inputs()) - plain).abs().max() > 1e-2


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", [name for name in ADAPTERS if not name.startswith("lokr")])
@torch.no_grad()
def test_a_peft_folder_is_the_trained_network_on_diffusers(tmp_path: Path, base: Path, name: str) -> None:
    """PEFT's own reading; and this package's, of the same folder."""
    method, network, averages = built(recipe_of(tmp_path, base, adapter(name, peft_folder=True)))
    method.write(network, averages, tmp_path / "style.safetensors", {})
    folder = tmp_path / "style-peft"
    model = factory.reference_model(factory.diffusers_config(hidden=72, depth=2, captions=8))
    loaded = peft.PeftModel.from_pretrained(model, folder)
    latent, timestep, context, mask = inputs()
    torch.testing.assert_close(reference.predict(loaded, latent, timestep, context, mask), network(*inputs()), rtol=1e-5, atol=1e-5)
    ours = load_transformer(base)
    assert not merge_file(folder, 1.0, ours, None).left
    torch.testing.assert_close(ours(*inputs()), network(*inputs()), rtol=1e-5, atol=1e-5)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "model.safetensors" and config["inference_mode"]


@pytest.mark.parametrize("base_precision", ["fp8", "nf4"])
def test_a_packed_base_is_never_in_a_result(tmp_path: Path, base: Path, base_precision: str) -> None:
    if base_precision == "nf4":
        pytest.importorskip("bitsandbytes")
    method, network, averages = built(recipe_of(tmp_path, base, adapter("lora", base=base_precision)))
    method.write(network, averages, tmp_path / "style.safetensors", {})
    tensors = load_file(tmp_path / "style.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.float32}
    assert all(key.endswith((".lora_up.weight", ".lora_down.weight", ".alpha")) for key in tensors)
    control, network, averages = built(recipe_of(tmp_path, base, {"name": "controlnet", "blocks": 1, "base": base_precision}))
    control.write(network, averages, tmp_path / "control.safetensors", {})
    stored = load_file(tmp_path / "control.safetensors")
    assert all(key.startswith("controlnet.0.") for key in stored) and {value.dtype for value in stored.values()} == {torch.float16}


@torch.no_grad()
def test_t5_is_written_beside_and_both_halves_predict_as_trained(tmp_path: Path, base: Path) -> None:
    pytest.importorskip("sentencepiece")
    from pixart.text.encoder import load_text_encoder
    from tests.support.tiny_text import save_t5_file, tiny_t5

    t5 = save_t5_file(tiny_t5(width=8), tmp_path / "t5.safetensors")
    recipe = recipe_of(tmp_path, base, adapter("lora", text_rank=2, peft_folder=True), source={"name": "scenes", "text_encoder": str(t5)})
    method, network, averages = built(recipe)
    method.write(network, averages, tmp_path / "style.safetensors", {})
    model, encoder = load_transformer(base), load_text_encoder(t5)
    fit = merge_file(tmp_path / "style.safetensors", 1.0, model, encoder.model)
    assert len(fit.text_layers) == 2 * 7 and not fit.left
    texts = ["a red circle", "blue"]
    encoded = encoder.encode(texts)
    latent, timestep = inputs()[:2]
    expected = network(latent, timestep, captions=texts)
    torch.testing.assert_close(model(latent, timestep, encoded.states, encoded.mask), expected, rtol=1e-5, atol=1e-5)
    plain = load_text_encoder(t5).encode(texts)
    assert (encoded.states - plain.states).abs().max() > 1e-2
    text = peft.PeftModel.from_pretrained(tiny_t5(width=8), tmp_path / "style-peft-text")
    assert sum("lora_A" in name for name, _ in text.named_parameters()) == 2 * 7
    method, network, averages = built(recipe_of(tmp_path, base, adapter("lora", peft_folder=True)))
    method.write(network, averages, tmp_path / "style.safetensors", {})  # as --overwrite does
    assert (tmp_path / "style-peft").is_dir() and not (tmp_path / "style-peft-text").exists()


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@torch.no_grad()
def test_a_whole_model_in_each_layout_is_the_trained_network(tmp_path: Path, base: Path, dtype: str) -> None:
    tolerance = {"fp16": 1e-2, "bf16": 1e-1, "fp32": 1e-5}[dtype]
    latent, timestep, context, mask = inputs()
    for layout, name in (("original", "m.safetensors"), ("original", "m.pth"), ("diffusers", "d.safetensors"), ("diffusers", "folder")):
        method, network, averages = built(recipe_of(tmp_path, base, {"name": "full", "layout": layout, "save_dtype": dtype}))
        method.write(network, averages, tmp_path / name, {"step": "3"})
        expected = network(*inputs())
        torch.testing.assert_close(load_transformer(tmp_path / name, dtype=torch.float32)(*inputs()), expected, rtol=tolerance, atol=tolerance)
        detection = inspect_file(tmp_path / name)
        assert (detection.family, detection.base_size, detection.config.position_range) == ("sigma", 1024, 32) and detection.ema
    theirs = diffusers.PixArtTransformer2DModel.from_pretrained(tmp_path / "folder", torch_dtype=torch.float32).eval()
    torch.testing.assert_close(reference.predict(theirs, latent, timestep, context, mask), expected, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def test_a_controlnet_names_the_range_of_its_hints(tmp_path: Path, base: Path) -> None:
    recipe = recipe_of(tmp_path, base, {"name": "controlnet", "blocks": 1, "save_dtype": "fp32"}, source={"name": "scenes", "text_encoder": "", "hints": True})
    method, network, averages = built(recipe)
    method.write(network, averages, tmp_path / "control.safetensors", {"step": "3"})
    hint = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(1))
    loaded = ControlledTransformer(load_transformer(base), load_controlnet(tmp_path / "control.safetensors"))
    torch.testing.assert_close(loaded(*inputs(), hint=hint), network(*inputs(), hint=hint), rtol=1e-5, atol=1e-5)
    facts = metadata(tmp_path / "control.safetensors")
    assert facts["pixart.hint_range"] == "-1..1" and json.loads(facts["pixart.hints"]) is True
    assert facts["modelspec.architecture"] == "pixart-sigma/controlnet"


@torch.no_grad()
def test_a_controlnet_in_fp8_takes_half_the_bytes_and_computes_in_bf16(tmp_path: Path, base: Path) -> None:
    outputs, hint = [], torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(1))
    for dtype in ("fp16", "fp8"):
        recipe = recipe_of(tmp_path, base, {"name": "controlnet", "blocks": 1, "save_dtype": dtype}, source={"name": "scenes", "text_encoder": "", "hints": True})
        method, network, averages = built(recipe)
        method.write(network, averages, tmp_path / f"{dtype}.safetensors", {"step": "3"})
        control = load_controlnet(tmp_path / f"{dtype}.safetensors")
        assert {p.dtype for p in control.parameters()} == {torch.float16 if dtype == "fp16" else torch.bfloat16}
        outputs.append(ControlledTransformer(load_transformer(base), control.float())(*inputs(), hint=hint))
    with safe_open(tmp_path / "fp8.safetensors", "pt") as file:
        dtypes = {key: file.get_slice(key).get_dtype() for key in file.keys()}
    assert {key.rsplit(".", 1)[-1] for key, dtype in dtypes.items() if dtype == "F8_E4M3"} == {"weight"}
    assert dtypes["controlnet.0.copied_block.attn.qkv.weight"] == dtypes["controlnet.0.before_proj.weight"] == "F8_E4M3"
    assert dtypes["controlnet.0.copied_block.scale_shift_table"] == dtypes["controlnet.0.copied_block.mlp.fc1.bias"] == "F16"
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0.05, atol=0.05)


def test_a_result_says_what_it_is_and_nothing_of_its_owner(tmp_path: Path, base: Path) -> None:
    recipe = replace(recipe_of(tmp_path, base, adapter("lora")), variant="sigma-512")
    method, network, averages = built(recipe)
    method.write(network, averages, tmp_path / "out.safetensors", {"step": "3", "license": "Apache-2.0"})
    facts = metadata(tmp_path / "out.safetensors")
    assert facts["modelspec.sai_model_spec"] == "1.0.1" and facts["modelspec.architecture"] == "pixart-sigma/lora"
    assert (facts["modelspec.title"], facts["modelspec.resolution"], facts["modelspec.prediction_type"]) == ("out", "64x64", "epsilon")
    assert facts["step"] == "3" and facts["pixart.variant"] == "sigma-512" and "license" not in facts
    import hashlib

    assert json.loads(facts["pixart.base"]) == {"file": "model.safetensors", "sha256": hashlib.sha256(base.read_bytes()).hexdigest()}
    told = json.loads(facts["pixart.recipe"])
    assert told["method"]["rank"] == 4 and told["initialize"] == "model.safetensors" and str(tmp_path) not in json.dumps(facts)


def test_places_are_their_last_names() -> None:
    assert without_places({"a": ["/home/me/x/cats", "~/cats", "C:\\Users\\me\\cats", "\\\\share\\cats"], "b": "runs/x", "c": 3}) == {
        "a": ["cats"] * 4, "b": "runs/x", "c": 3,
    }  # fmt: skip


def test_a_folders_hash_is_of_its_weights(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "a", "diffusers-shards")
    before = content_hash(folder)
    (folder / "notes.txt").write_text("x")
    assert content_hash(folder) == before
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    assert content_hash(folder) != before


@pytest.mark.parametrize("method", ["full", "diffusers", "lora", "controlnet"])
def test_a_disk_that_fills_leaves_the_former_result(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    chosen = {"lora": adapter("lora", peft_folder=True), "controlnet": {"name": "controlnet", "blocks": 1}, "diffusers": {"name": "full", "layout": "diffusers"}}
    part, network, averages = built(recipe_of(tmp_path, base, chosen.get(method, "full")))
    out = tmp_path / "results" / "out.safetensors"
    part.write(network, averages, out, {})
    before = {path.relative_to(tmp_path): path.read_bytes() for path in out.parent.rglob("*") if path.is_file()}

    def full_disk(tensors, path, **_: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    for place in ("pixart.training.write", "pixart.checkpoints.convert", "pixart.training.adapter_files"):
        monkeypatch.setattr(f"{place}.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        part.write(network, averages, out, {})
    assert {path.relative_to(tmp_path): path.read_bytes() for path in out.parent.rglob("*") if path.is_file()} == before
