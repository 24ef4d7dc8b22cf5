"""T5 loading and encoding against transformers."""
import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")
pytest.importorskip("sentencepiece")

from pixart import load_text_encoder
from pixart.errors import InputError, TextEncoderError, UnsupportedError
from tests.support.tiny_text import save_t5_file, save_t5_folder, sentencepiece_model, tiny_t5

PROMPTS = ["a red circle above a blue square", "", "small star"]


def reference_states(model, prompt: str) -> torch.Tensor:
    """One prompt at a time through transformers, without padding."""
    import sentencepiece

    ids = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model(), add_eos=True).encode(prompt)
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).last_hidden_state[0]


def check_against(encoder, model) -> None:
    found = encoder.encode(PROMPTS, 300)
    assert found.mask.dtype == torch.bool and found.mask.sum(1).tolist() == list(found.token_counts)
    assert found.states.shape[1] == max(found.token_counts)
    for row, prompt in enumerate(PROMPTS):
        expected = reference_states(model, prompt)
        torch.testing.assert_close(found.states[row][found.mask[row]], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("d_kv", [8, 64])
def test_single_file_of_any_shape(tmp_path, gated, d_kv):
    model = tiny_t5(width=48, layers=3, gated=gated, d_kv=d_kv)
    encoder = load_text_encoder(save_t5_file(model, tmp_path / "t5.safetensors"))
    assert encoder.width == 48
    check_against(encoder, model)


@pytest.mark.parametrize("shard", [None, "20KB"])
@pytest.mark.parametrize("pipeline", [False, True])
def test_folders(tmp_path, shard, pipeline):
    model = tiny_t5()
    folder = save_t5_folder(model, tmp_path / "hf", shard, pipeline)
    assert bool(list(folder.rglob("*.index.json"))) == bool(shard)
    check_against(load_text_encoder(folder), model)
    if pipeline:
        check_against(load_text_encoder(folder / "text_encoder"), model)


def test_pickled_folder_shards_load_weights_only(tmp_path):
    model = tiny_t5()
    folder = save_t5_folder(model, tmp_path / "hf")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    check_against(load_text_encoder(folder), model)


def test_whole_t5_and_prefix_and_alias(tmp_path):
    model = tiny_t5()
    tensors = load_file(save_t5_file(model, tmp_path / "t5.safetensors"))
    spiece = tensors.pop("spiece_model")
    tensors = {f"t5xxl.transformer.{key}": value for key, value in tensors.items()}
    tensors["t5xxl.transformer.encoder.embed_tokens.weight"] = tensors.pop("t5xxl.transformer.shared.weight")
    tensors["t5xxl.transformer.decoder.block.0.weight"] = torch.zeros(2)
    save_file({**tensors, "spiece_model": spiece}, tmp_path / "t5.safetensors")
    check_against(load_text_encoder(tmp_path / "t5.safetensors"), model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [True, False])
def test_half_precision_stays_close(tmp_path, dtype, stored):
    model = tiny_t5()
    path = save_t5_file(model, tmp_path / "t5.safetensors", dtype=dtype if stored else torch.float32)
    encoder = load_text_encoder(path, dtype=None if stored else dtype)
    states = encoder.encode(PROMPTS[:1]).states[0]
    assert states.dtype == dtype
    cosine = torch.cosine_similarity(states.float(), reference_states(model, PROMPTS[0]), dim=-1)
    assert cosine.min() > 0.999


def test_fp8_file_is_read_as_bf16(tmp_path):
    tensors = load_file(save_t5_file(tiny_t5(), tmp_path / "t5.safetensors"))
    spiece = tensors.pop("spiece_model")
    save_file({**{k: v.to(torch.float8_e4m3fn) for k, v in tensors.items()}, "spiece_model": spiece}, tmp_path / "8.safetensors")
    assert load_text_encoder(tmp_path / "8.safetensors").encode(["red"]).states.dtype == torch.bfloat16


def test_truncation_is_reported_and_logged(tmp_path, caplog):
    encoder = load_text_encoder(save_t5_file(tiny_t5(), tmp_path / "t5.safetensors"))
    with caplog.at_level(logging.WARNING):
        found = encoder.encode(["red circle above blue square", "red"], max_tokens=4)
    assert found.token_counts == (6, 2) and found.truncated == ("blue square", "")
    assert "6 tokens, the limit is 4" in caplog.text and "blue square" in caplog.text
    many = encoder.encode(["red " * 10_000], max_tokens=300)
    assert many.states.shape[:2] == (1, 300) and torch.isfinite(many.states).all()


def test_empty_list_is_refused(tmp_path):
    encoder = load_text_encoder(save_t5_file(tiny_t5(), tmp_path / "t5.safetensors"))
    with pytest.raises(InputError, match="No prompts"):
        encoder.encode([])


def test_tokenizer_is_found_beside_or_asked_for(tmp_path):
    model = tiny_t5()
    path = save_t5_file(model, tmp_path / "t5.safetensors", tokenizer=False)
    with pytest.raises(TextEncoderError, match="without a tokenizer.*pixart_sigma_sdxlvae_T5_diffusers"):
        load_text_encoder(path)
    given = tmp_path / "elsewhere" / "spiece.model"
    given.parent.mkdir()
    given.write_bytes(sentencepiece_model())
    check_against(load_text_encoder(path, tokenizer=given), model)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "spiece.model").write_bytes(sentencepiece_model())
    check_against(load_text_encoder(path), model)


def test_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
    model = tiny_t5()
    model.resize_token_embeddings(20)
    path = save_t5_file(model, tmp_path / "t5.safetensors")
    with pytest.raises(TextEncoderError, match="embeddings for 20"):
        load_text_encoder(path)


def test_missing_shard_is_named(tmp_path):
    folder = save_t5_folder(tiny_t5(), tmp_path / "hf", "20KB")
    gone = sorted(folder.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(TextEncoderError, match=gone.name):
        load_text_encoder(folder)


def test_truncated_empty_and_absent_files(tmp_path):
    path = save_t5_file(tiny_t5(), tmp_path / "t5.safetensors")
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(TextEncoderError, match="truncated|empty|does not exist"):
        load_text_encoder(path)
    path.write_bytes(b"")
    with pytest.raises(TextEncoderError, match="the file is empty"):
        load_text_encoder(path)
    with pytest.raises(TextEncoderError, match="does not exist"):
        load_text_encoder(tmp_path / "absent.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TextEncoderError, match="found nothing; expected one weight file, model.safetensors"):
        load_text_encoder(tmp_path / "empty")
    (tmp_path / "t5.gguf").write_bytes(b"GGUF")
    with pytest.raises(TextEncoderError, match="GGUF file; load it with ComfyUI-GGUF"):
        load_text_encoder(tmp_path / "t5.gguf")


def test_pickle_with_code_is_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    folder = tmp_path / "hf"
    folder.mkdir()
    torch.save({"x": Payload()}, folder / "pytorch_model.bin")
    with pytest.raises(TextEncoderError, match="could run code"):
        load_text_encoder(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "key, what",
    [
        ("text_model.encoder.layers.0.mlp.fc1.weight", "a CLIP text encoder"),
        ("x_embedder.proj.weight", "a diffusion transformer"),
        ("decoder2.mystery", "not a T5 encoder:"),
    ],
)
def test_foreign_files_are_recognised(tmp_path, key, what):
    save_file({key: torch.zeros(2, 2)}, tmp_path / "f.safetensors")
    with pytest.raises(TextEncoderError, match=what):
        load_text_encoder(tmp_path / "f.safetensors")


def _edited(tmp_path: Path, edit) -> Path:
    path = save_t5_file(tiny_t5(), tmp_path / "t5.safetensors")
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)
    return path


def test_every_wrong_key_is_listed(tmp_path):
    def edit(tensors):
        del tensors["encoder.block.1.layer.0.SelfAttention.v.weight"]
        tensors["encoder.extra"] = torch.zeros(1)
        tensors["encoder.final_layer_norm.weight"] = torch.zeros(3)

    with pytest.raises(TextEncoderError) as error:
        load_text_encoder(_edited(tmp_path, edit))
    for part in ("missing encoder.block.1.layer.0.SelfAttention.v.weight", "unknown encoder.extra", "(3,), expected (32,)"):
        assert part in str(error.value)


def test_nan_and_umt5(tmp_path):
    norm = "encoder.final_layer_norm.weight"
    bias = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
    with pytest.raises(TextEncoderError, match=norm):
        load_text_encoder(_edited(tmp_path, lambda t: t.update({norm: t[norm] * float("nan")})))
    with pytest.raises(UnsupportedError, match="UMT5"):
        load_text_encoder(_edited(tmp_path, lambda t: t.update({bias: torch.zeros(32, 4)})))


def test_config_that_contradicts_the_weights(tmp_path):
    folder = save_t5_folder(tiny_t5(), tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "d_ff": 99}))
    with pytest.raises(TextEncoderError, match=r"d_ff 99 \(weights: 64\)"):
        load_text_encoder(folder)


def test_unsupported_dtype(tmp_path):
    with pytest.raises(UnsupportedError, match="float8"):
        load_text_encoder(tmp_path, dtype=torch.float8_e4m3fn)


@pytest.mark.parametrize("ending", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("precision", [None, "fp8_e4m3fn"])
def test_scaled_fp8_file(tmp_path, ending, precision):
    """Weights of which plain fp8 would leave little: the scale brings them into its range."""
    model = tiny_t5()
    state = model.state_dict()
    linear = {name: value for name, value in state.items() if "Dense" in name or "Attention" in name and "bias" not in name}

    def edit(tensors):
        for name, value in linear.items():
            scale = value.abs().max() / 448
            tensors[name] = (value / scale).to(torch.float8_e4m3fn)
            layer = name.removesuffix(".weight")
            tensors[f"{layer}.{ending}"] = scale.reshape(())
            if ending == "weight_scale":
                tensors[f"{layer}.comfy_quant"] = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
            else:
                tensors[f"{layer}.scale_input"] = torch.ones(())
        if ending == "scale_weight":
            tensors["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)

    encoder = load_text_encoder(_edited(tmp_path, edit), precision=precision)
    found = encoder.encode(PROMPTS[:1]).states[0].float()
    assert torch.cosine_similarity(found, reference_states(model, PROMPTS[0]), dim=-1).min() > (0.99 if precision is None else 0.97)


@pytest.mark.parametrize(
    "ending, value", [("comfy_quant", torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)), ("weight_scale", torch.ones(8))]
)
def test_other_quantizations_of_the_host_are_named(tmp_path, ending, value):
    with pytest.raises(UnsupportedError, match="made for ComfyUI's own loader"):
        load_text_encoder(_edited(tmp_path, lambda t: t.update({f"encoder.block.0.layer.0.SelfAttention.q.{ending}": value})))
