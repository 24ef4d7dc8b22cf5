"""PixArtT5Loader and PixArtTextEncode: any T5, the host's own conditioning, no silent cuts."""
from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import nodes as host_nodes
from tests.support import host, tiny_text
from tests.support.host_models import load_model, sample, write_model
from tests.support.host_text import node

errors = host.pack_module("pixart.errors")
text_nodes = host.pack_module("nodes.text")
encoder = host.pack_module("nodes.host.text_encoder")
PROMPTS = ["a red circle above a blue square", "", "a", "large green triangle on plain background with a star"]


def transformers_states(reference, prompt: str) -> torch.Tensor:
    """Independent path: sentencepiece and transformers, (1, M, C)."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=tiny_text.sentencepiece_model())
    with torch.no_grad():
        return reference(input_ids=torch.tensor([processor.encode(prompt, add_eos=True)])).last_hidden_state


class TestLoading:
    @pytest.mark.parametrize("prompt", PROMPTS)
    def test_states_agree_with_transformers(self, clip, reference, prompt: str) -> None:
        found, expected = node(clip, prompt)[0], transformers_states(reference, prompt)
        assert found.shape == expected.shape
        assert torch.cosine_similarity(found, expected, dim=-1).min() > 0.9999

    @pytest.mark.parametrize("gated", [True, False])
    def test_other_shapes(self, gated: bool, models: Path) -> None:
        model = tiny_text.tiny_t5(width=48, layers=3, gated=gated, d_kv=4)
        tiny_text.save_t5_file(model, models / "text_encoders" / "t5.safetensors")
        loaded = text_nodes.PixArtT5Loader.execute(t5_name="t5.safetensors", precision="default", device="cpu").result[0]
        found, expected = node(loaded, PROMPTS[0])[0], transformers_states(model, PROMPTS[0])
        assert torch.cosine_similarity(found, expected, dim=-1).min() > 0.9999

    @pytest.mark.parametrize(("shard", "pipeline"), [(None, False), ("40KB", False), (None, True)])
    def test_folders(self, shard: str | None, pipeline: bool, reference, models: Path) -> None:
        tiny_text.save_t5_folder(reference, models / "text_encoders" / "mine", shard, pipeline)
        listed = text_nodes.PixArtT5Loader.INPUT_TYPES()["required"]["t5_name"][1]["options"]
        assert "mine" in listed
        loaded = text_nodes.PixArtT5Loader.execute(t5_name="mine", precision="default", device="default").result[0]
        found, expected = node(loaded, PROMPTS[0])[0], transformers_states(reference, PROMPTS[0])
        assert torch.cosine_similarity(found, expected, dim=-1).min() > 0.9999

    @pytest.mark.parametrize(
        ("precision", "dtype", "cosine"),
        [("fp32", torch.float32, 0.9999), ("bf16", torch.bfloat16, 0.999), ("fp16", torch.float16, 0.9999),
         ("fp8_e4m3fn", torch.float8_e4m3fn, 0.97)],
    )  # fmt: skip
    def test_precision(self, precision: str, dtype: torch.dtype, cosine: float, reference, t5_file: Path) -> None:
        loaded = encoder.load_t5(str(t5_file), precision, "default")
        assert loaded.cond_stage_model.t5xxl.transformer.encoder.block[0].layer[0].SelfAttention.q.weight.dtype == dtype
        found, expected = node(loaded, PROMPTS[0])[0], transformers_states(reference, PROMPTS[0])
        assert torch.cosine_similarity(found, expected, dim=-1).min() > cosine

    @pytest.mark.parametrize("kind", ["prefix", "wrapper", "all-in-one", "pth"])
    def test_whatever_stands_around_it(self, kind: str, reference, t5_file: Path, tmp_path: Path) -> None:
        state, path = load_file(t5_file), tmp_path / ("t5.pth" if kind == "pth" else "t5.safetensors")
        if kind == "pth":
            torch.save({"model": state, "epoch": 3}, path)
        elif kind == "wrapper":
            save_file({key.replace("encoder.block.1.", "encoder.block.1._orig_mod."): value for key, value in state.items()}, path)
        else:
            others = {"vae.decoder.conv_in.weight": torch.zeros(2), "step": torch.tensor(3)} if kind == "all-in-one" else {}
            save_file({**{f"text_encoder.transformer.{key}": value for key, value in state.items()}, **others}, path)
        found = node(encoder.load_t5(str(path), "default", "default"), PROMPTS[0])[0]
        torch.testing.assert_close(found, transformers_states(reference, PROMPTS[0]), rtol=1e-3, atol=1e-4)

    def test_device(self, t5_file: Path) -> None:
        loaded = encoder.load_t5(str(t5_file), "default", "cpu")
        assert loaded.patcher.load_device == loaded.patcher.offload_device == torch.device("cpu")

    def test_tokenizer_json(self, reference, models: Path) -> None:
        """A folder with tokenizer.json instead of spiece.model."""
        import tokenizers

        folder = tiny_text.save_t5_folder(reference, models / "text_encoders" / "json")
        (folder / "spiece.model").unlink()
        pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"\u2581{word}", -5.0) for word in ("a", "red", "circle"))]
        made = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2, byte_fallback=False))
        made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
        made.save(str(folder / "tokenizer.json"))
        loaded = encoder.load_t5(str(folder), "default", "default")
        assert loaded.tokenize("a red circle")["t5xxl"] == [[(3, 1.0), (4, 1.0), (5, 1.0), (1, 1.0)]]

    def test_the_hosts_classes_are_used(self, clip) -> None:
        """So that every pack that knows the host's PixArt text encoder knows this one."""
        import comfy.text_encoders.pixart_t5 as pixart_t5

        assert isinstance(clip.cond_stage_model, pixart_t5.PixArtT5XXL)
        assert isinstance(clip.cond_stage_model.t5xxl, pixart_t5.T5XXLModel)

    def test_host_can_rebuild_it(self, clip) -> None:
        factory, arguments = clip.patcher.cached_patcher_init
        again = factory(*arguments, disable_dynamic=True)
        for key, value in clip.cond_stage_model.state_dict().items():
            assert torch.equal(again.model.state_dict()[key].cpu(), value.cpu())

    def test_where_the_host_maps_weights_the_file_is_not_read_whole(self, t5_file, tmp_path, monkeypatch) -> None:
        """A sample of each weight is looked at; a NaN there is still found."""
        module = host.pack_module("nodes.host.text_encoder")
        monkeypatch.setattr(module, "pages_weights", lambda: True)
        monkeypatch.setattr(module, "SAMPLED", 16)
        looked, real = [], module.is_finite
        monkeypatch.setattr(module, "is_finite", lambda values: (looked.append(values.numel()), real(values))[1])
        module.load_t5(str(t5_file), "default", "default")
        assert len(looked) > 10 and max(looked) <= 16
        weights = load_file(t5_file)
        weights["encoder.block.0.layer.0.SelfAttention.q.weight"][0, 3] = float("nan")
        save_file(weights, tmp_path / "t5.safetensors")
        with pytest.raises(errors.TextEncoderError, match="NaN or infinite values in .*SelfAttention.q.weight"):
            module.load_t5(str(tmp_path / "t5.safetensors"), "default", "default")

    def test_saved_with_its_tokenizer(self, clip) -> None:
        saved = clip.get_sd()["t5xxl.spiece_model"]
        assert saved.numpy().tobytes() == tiny_text.sentencepiece_model()


class TestEncoding:
    @pytest.mark.parametrize("prompt", [*PROMPTS, "a (red circle:1.4) above a (blue:0.5) square", "((star))"])
    def test_same_as_clip_text_encode(self, clip, prompt: str) -> None:
        """The host's own node on the same CLIP, weights included."""
        expected = host_nodes.CLIPTextEncode().encode(clip, prompt)[0][0][0]
        assert torch.equal(node(clip, prompt)[0], expected)

    def test_weights_act(self, clip) -> None:
        plain, weighted = node(clip, "a red circle")[0], node(clip, "a (red:1.5) circle")[0]
        assert plain.shape == weighted.shape and not torch.allclose(plain, weighted)

    def test_empty_prompt_is_one_token(self, clip) -> None:
        states, shown = node(clip, "")
        assert states.shape[1] == 1 and shown == "1 of 300 tokens"

    def test_count_is_shown(self, clip) -> None:
        states, shown = node(clip, PROMPTS[0])
        assert shown == f"{states.shape[1]} of 300 tokens"

    def test_cut_keeps_the_end_token_and_says_what_is_lost(self, clip, reference, caplog) -> None:
        with caplog.at_level(logging.WARNING):
            states, shown = node(clip, "a red circle above a blue square", 4)
        assert states.shape[1] == 4
        tokens = clip.tokenize("a red circle above a blue square")["t5xxl"][0]
        ids = [token for token, _ in tokens[:3]] + [1]
        with torch.no_grad():
            expected = reference(input_ids=torch.tensor([ids])).last_hidden_state
        assert torch.cosine_similarity(states, expected, dim=-1).min() > 0.9999
        assert shown.startswith("4 of 4 tokens\ncut (") and shown.endswith("square")
        assert "the limit is 4" in caplog.text and "square" in caplog.text

    def test_ten_thousand_words(self, clip) -> None:
        states, shown = node(clip, "red circle " * 5000, 120)
        assert states.shape[1] == 120 and shown.startswith("120 of 120 tokens\ncut (")

    def test_half_a_character_is_a_question_mark(self, clip) -> None:
        """A lone surrogate, as broken JSON holds it."""
        assert torch.equal(node(clip, "red \ud83c circle")[0], node(clip, "red ? circle")[0])

    @pytest.mark.parametrize("weight", ["nan", "1e40"])
    def test_a_weight_that_overflows_is_refused(self, clip, weight: str) -> None:
        """It would draw a black picture."""
        with pytest.raises(errors.TextEncoderError, match="NaN or infinite.*weight"):
            node(clip, f"a (red:{weight}) circle")

    def test_limit_of_one_is_the_empty_prompt(self, clip) -> None:
        assert torch.equal(node(clip, "a red circle", 1)[0], node(clip, "")[0])

    def test_limit_of_zero_is_refused(self, clip) -> None:
        with pytest.raises(errors.InputError, match="max_tokens is 0"):
            node(clip, "a", 0)

    def test_embeddings_count_and_apply(self, reference, t5_file: Path, models: Path) -> None:
        """Textual inversion through the host's `embedding:` syntax."""
        save_file({"t5xxl": torch.ones(2, 32)}, str(models / "embeddings" / "mine.safetensors"))
        loaded = encoder.load_t5(str(t5_file), "default", "default")
        states, shown = node(loaded, "a embedding:mine circle")
        assert states.shape[1] == int(shown.split()[0]) == node(loaded, "a circle")[0].shape[1] + 2

    def test_padding_of_other_clips_is_taken_off(self, clip, monkeypatch) -> None:
        """SD3's and Flux's tokenizers pad T5 to 77 or 256; PixArt was not trained with such tokens."""
        tokenize = clip.tokenizer.tokenize_with_weights

        def padded(text, return_word_ids=False, **kwargs):
            row = tokenize(text, return_word_ids, **kwargs)["t5xxl"][0]
            return {"t5xxl": [row + [(0, 1.0)] * (77 - len(row))]}

        expected = node(clip, PROMPTS[0])[0]
        monkeypatch.setattr(clip.tokenizer, "tokenize_with_weights", padded)
        assert torch.equal(node(clip, PROMPTS[0])[0], expected)

    def test_clip_without_t5_is_refused(self, clip, monkeypatch) -> None:
        monkeypatch.setattr(clip.tokenizer, "tokenize_with_weights", lambda *a, **k: {"l": [[(49406, 1.0)]]})
        with pytest.raises(errors.TextEncoderError, match="token streams l.*T5"):
            node(clip, "a")

    def test_clip_whose_t5_was_not_loaded_is_refused(self, clip, monkeypatch) -> None:
        """SD3's from CLIP-L and CLIP-G alone: its tokenizer has the stream, its encoder gives zeros for it."""
        from types import SimpleNamespace

        monkeypatch.setattr(clip, "cond_stage_model", SimpleNamespace(t5xxl=None))
        with pytest.raises(errors.TextEncoderError, match="without its T5"):
            node(clip, "a")

    def test_no_clip_is_refused(self) -> None:
        with pytest.raises(errors.TextEncoderError, match="no text encoder"):
            node(None, "a")


def test_prompt_to_latent(clip, tmp_path: Path) -> None:
    """Both nodes together, on a model of the T5's width."""
    model = load_model(write_model(tmp_path))
    positive = text_nodes.PixArtTextEncode.execute(clip=clip, text=PROMPTS[0], max_tokens=300).result[0]
    negative = host_nodes.CLIPTextEncode().encode(clip, "")[0]
    first = sample(model, positive, negative)
    other = text_nodes.PixArtTextEncode.execute(clip=clip, text=PROMPTS[3], max_tokens=300).result[0]
    assert torch.isfinite(first).all() and (sample(model, other, negative) - first).abs().max() > 1e-3
    assert torch.equal(sample(model, positive, negative), first)


def test_pickle_is_read_once(reference, tmp_path: Path, monkeypatch) -> None:
    calls = []
    original = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: calls.append(k) or original(*a, **k))
    state = {key: value.clone() for key, value in reference.state_dict().items()}
    state["spiece_model"] = torch.frombuffer(bytearray(tiny_text.sentencepiece_model()), dtype=torch.uint8)
    torch.save(state, tmp_path / "t5.pth", _use_new_zipfile_serialization=False)
    loaded = encoder.load_t5(str(tmp_path / "t5.pth"), "default", "default")
    assert len(calls) == 1 and calls[0]["weights_only"] is True
    found, expected = node(loaded, PROMPTS[0])[0], transformers_states(reference, PROMPTS[0])
    assert torch.cosine_similarity(found, expected, dim=-1).min() > 0.9999


@pytest.mark.skipif(encoder.pages_weights(), reason="dynamic VRAM takes the tensors over")
def test_cast_weights_are_let_go_of_layer_by_layer(tmp_path: Path, monkeypatch) -> None:
    """The released T5 folder is in fp32: loaded in bf16, it must not stand in memory twice."""
    import gc
    import weakref

    weights = host.pack_module("pixart.text.weights")
    original, alive, most, total = weights.cast, weakref.WeakSet(), [], []

    def watched(*arguments):
        value = original(*arguments)
        gc.collect()
        alive.add(value)
        most.append(sum(each.nbytes for each in alive))
        total.append(value.nbytes)
        return value

    monkeypatch.setattr(weights, "cast", watched)
    path = tiny_text.save_t5_file(tiny_text.tiny_t5(layers=6), tmp_path / "t5.safetensors")
    gc.freeze()  # what was there before needn't be looked at after each weight
    loaded = encoder.load_t5(str(path), "bf16", "default")
    gc.unfreeze()
    assert len(total) > 50 and max(most) < 0.5 * sum(total)
    assert torch.isfinite(node(loaded, PROMPTS[0])[0]).all()


def test_dtype_is_that_of_most_weights(reference, tmp_path: Path) -> None:
    """Not that of the embedding, which some files keep in fp32."""
    state = load_file(tiny_text.save_t5_file(reference, tmp_path / "t5.safetensors", dtype=torch.bfloat16))
    state["encoder.final_layer_norm.weight"] = state["encoder.final_layer_norm.weight"].float()
    state["shared.weight"] = state["shared.weight"].float()
    save_file(state, tmp_path / "t5.safetensors")
    loaded = encoder.load_t5(str(tmp_path / "t5.safetensors"), "default", "default")
    assert loaded.cond_stage_model.t5xxl.transformer.shared.weight.dtype == torch.bfloat16
