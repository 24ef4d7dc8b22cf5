"""Quantized T5 in the host: sized, offloaded, unloaded and run again without a change, and quantized once."""
from __future__ import annotations

import gc
import sys
import weakref
from pathlib import Path

import comfy.model_management as management
import pytest
import torch

import nodes as host_nodes
from tests.support import host, tiny_text
from tests.support.host_models import load_model, sample, write_model

pytest.importorskip("bitsandbytes")

errors = host.pack_module("pixart.errors")
text_nodes = host.pack_module("nodes.text")
core = host.pack_module("pixart.text.quantize")
folder = host.pack_module("pixart.text.folder")
PROMPT = "a red circle above a blue square"
FLOORS = {"int8": 0.999, "nf4": 0.85, "fp4": 0.8}  # so narrow a T5 can't average errors out; tests/text has a wider one


@pytest.fixture(scope="module")
def reference():
    """transformers' encoder, wide enough for blocks of 64."""
    return tiny_text.tiny_t5(width=32, d_kv=16)


@pytest.fixture
def t5(reference, models: Path) -> Path:
    """The same in the host's folder."""
    return tiny_text.save_t5_file(reference, models / "text_encoders" / "t5.safetensors")


def load(name: str, precision: str):
    return text_nodes.PixArtT5Loader.execute(t5_name=name, precision=precision, device="default").result[0]


def states(clip, text: str = PROMPT) -> torch.Tensor:
    return text_nodes.PixArtTextEncode.execute(clip=clip, text=text).result[0][0][0]


def expected_states(reference) -> torch.Tensor:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=tiny_text.sentencepiece_model())
    with torch.no_grad():
        return reference(input_ids=torch.tensor([processor.encode(PROMPT, add_eos=True)])).last_hidden_state


@pytest.mark.parametrize("precision", list(FLOORS))
def test_close_to_transformers_in_fp32(precision: str, reference, t5: Path) -> None:
    clip = load("t5.safetensors", precision)
    cosine = torch.cosine_similarity(states(clip), expected_states(reference), dim=-1)
    assert FLOORS[precision] < cosine.min() < 0.999999
    linears = [module for module in clip.cond_stage_model.modules() if isinstance(module, torch.nn.Linear)]
    assert not linears and type(clip) is sys.modules["comfy.sd"].CLIP


@pytest.mark.parametrize("precision", list(FLOORS))
def test_same_as_the_core(precision: str, t5: Path) -> None:
    """transformers' T5 with the same packed weights; the host keeps its sums in fp32, transformers in bf16."""
    expected = host.pack_module("pixart.text.encoder").load_text_encoder(t5, precision=precision).encode([PROMPT]).states.float()
    assert torch.cosine_similarity(states(load("t5.safetensors", precision)), expected, dim=-1).min() > 0.999


@pytest.mark.parametrize("precision", list(FLOORS))
def test_counting_unloading_and_a_second_run(precision: str, t5: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = load("t5.safetensors", precision)
    monkeypatch.setattr(core, "quantize_weight", None)  # from here on nothing may be quantized
    first = states(clip)
    model = clip.cond_stage_model
    real = sum(value.nbytes for value in (*model.parameters(), *model.buffers()))
    assert management.module_size(model) == clip.patcher.model_size() == real
    layer = model.t5xxl.transformer.encoder.block[0].layer[1].DenseReluDense.wo
    assert management.module_size(layer) == sum(value.nbytes for value in layer.buffers()) < 0.65 * 2 * 32 * 64
    for _ in range(2):
        management.unload_all_models()
        assert management.module_size(model) == real
        clip.get_sd()
        assert torch.equal(states(clip), first)
        clip.patcher.model.to(clip.patcher.offload_device)
        assert torch.equal(states(clip.clone()), first)


def test_partly_loaded(t5: Path) -> None:
    """Where memory is short, the host loads some layers and leaves the others."""
    clip = load("t5.safetensors", "int8")
    first = states(clip)
    management.unload_all_models()
    clip.patcher.load(torch.device("cpu"), lowvram_model_memory=clip.patcher.model_size() // 2)
    tokens = clip.tokenize(PROMPT)
    found = clip.cond_stage_model.encode_token_weights(tokens)[0]
    assert torch.equal(found, first)
    clip.patcher.detach()
    assert torch.equal(states(clip), first)


def test_loras_for_t5_leave_packed_weights_alone(t5: Path) -> None:
    """int8 weights have the shape of the original: a patch must not be added to them."""
    clip = load("t5.safetensors", "int8")
    first = states(clip)
    state = clip.cond_stage_model.state_dict()
    name = "encoder.block.0.layer.0.SelfAttention.q"
    shapes = {"up": (64, 2), "down": (2, 32)}
    lora = {f"text_encoders.t5xxl.transformer.{name}.lora_{end}.weight": torch.ones(shape) for end, shape in shapes.items()}
    import comfy.sd

    _, patched = comfy.sd.load_lora_for_models(None, clip, lora, 1.0, 1.0)
    assert torch.equal(states(patched), first)
    assert not [key for key in state if key.endswith("SelfAttention.q.weight")]


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_written_folder(precision: str, t5: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = states(load("t5.safetensors", precision))
    folder.quantize_folder(t5, models / "text_encoders" / "small", precision)
    monkeypatch.setattr(core, "quantize_weight", None)
    assert "small" in text_nodes.PixArtT5Loader.INPUT_TYPES()["required"]["t5_name"][1]["options"]
    for asked in ("default", precision, "bf16"):
        assert torch.equal(states(load("small", asked)), expected)
    with pytest.raises(errors.UnsupportedError, match=f"already quantized to {precision}"):
        load("small", "fp4")


def test_saved_by_the_host_and_loaded_again(t5: Path, models: Path) -> None:
    """CLIPSave writes the state dict; nothing of it is lost."""
    from safetensors.torch import save_file

    clip = load("t5.safetensors", "nf4")
    first = states(clip)
    saved = {key: value.contiguous() for key, value in clip.get_sd().items()}
    save_file(saved, models / "text_encoders" / "saved.safetensors")
    assert torch.equal(states(load("saved.safetensors", "default")), first)


def test_host_can_rebuild_it(t5: Path) -> None:
    clip = load("t5.safetensors", "nf4")
    factory, arguments = clip.patcher.cached_patcher_init
    again = factory(*arguments, disable_dynamic=True).model.state_dict()
    for key, value in clip.cond_stage_model.state_dict().items():
        assert torch.equal(again[key], value)


def test_prompt_to_latent(t5: Path, tmp_path: Path) -> None:
    """With the picture model in between, twice."""
    clip, model = load("t5.safetensors", "nf4"), load_model(write_model(tmp_path))
    found = []
    for _ in range(2):
        positive = text_nodes.PixArtTextEncode.execute(clip=clip, text=PROMPT).result[0]
        negative = host_nodes.CLIPTextEncode().encode(clip, "")[0]
        found.append(sample(model, positive, negative))
        management.unload_all_models()
    assert torch.isfinite(found[0]).all() and torch.equal(*found)


def test_without_bitsandbytes(t5: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(errors.TextEncoderError, match="pip install bitsandbytes.*fp8_e4m3fn work without"):
        load("t5.safetensors", "nf4")
    assert torch.isfinite(states(load("t5.safetensors", "fp8_e4m3fn"))).all()


@pytest.mark.parametrize("precision", ["nf4", "int8", "bf16", "default"])
def test_what_was_read_is_let_go(precision: str, reference, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pickle of the old kind lies in memory whole; the CLIP has weights of its own."""
    found = []

    def read(path):
        weights = original(path)
        found.extend([weakref.ref(weights), weakref.ref(weights.stored["encoder.block.0.layer.0.SelfAttention.q.weight"].value)])
        return weights

    state = {name: value.clone() for name, value in reference.state_dict().items()}
    folder = models / "text_encoders" / "old"
    tiny_text.save_t5_folder(reference, folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    encoder = host.pack_module("nodes.host.text_encoder")
    original = encoder.read_t5
    monkeypatch.setattr(encoder, "read_t5", read)
    clip = load("old", precision)
    gc.collect()
    assert [each() for each in found] == [None, None]
    assert torch.isfinite(states(clip)).all()
