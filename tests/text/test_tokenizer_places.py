"""Where the tokenizer of a T5 is found, and which one can't belong to it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

from pixart import load_text_encoder
from pixart.errors import TextEncoderError
from pixart.text.folder import quantize_folder
from pixart.text.tokenizer import fits
from tests.support.tiny_text import save_t5_file, sentencepiece_model, tiny_t5, tokenizer_json


def without_tokenizer(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return save_t5_file(tiny_t5(), path, tokenizer=False)


@pytest.mark.parametrize(
    ("weights", "tokenizer"),
    [
        ("t5.safetensors", "spiece.model"), ("t5.safetensors", "tokenizer/spiece.model"), ("t5.safetensors", "t5/spiece.model"),
        ("text_encoder/model.safetensors", "tokenizer/spiece.model"), ("text_encoder_3/model.safetensors", "tokenizer_3/spiece.model"),
        ("text_encoder_2/model.safetensors", "tokenizer_2/spiece.model"), ("text_encoder/model.safetensors", "spiece.model"),
    ],
)  # fmt: skip
def test_layouts_of_folders(tmp_path: Path, weights: str, tokenizer: str) -> None:
    path, place = without_tokenizer(tmp_path / "p" / weights), tmp_path / "p" / tokenizer
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(sentencepiece_model())
    assert load_text_encoder(path).encode(["a red circle"]).states.shape[1] > 1


CLIP_TOKENIZER = '{"version": "1.0", "model": {"type": "BPE", "vocab": {"<|startoftext|>": 0, "a": 1}, "merges": []}}'


def test_a_clip_tokenizer_beside_it_is_passed_over(tmp_path: Path) -> None:
    """Flat folders hold encoders of every kind."""
    path = without_tokenizer(tmp_path / "encoders" / "t5.safetensors")
    (path.parent / "tokenizer.json").write_text(CLIP_TOKENIZER)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "spiece.model").write_bytes(sentencepiece_model())
    assert load_text_encoder(path).width == 32


def test_a_quantized_folder_gets_the_tokenizer_that_fits_or_none(tmp_path: Path, caplog) -> None:
    path = without_tokenizer(tmp_path / "encoders" / "t5.safetensors")
    (path.parent / "tokenizer.json").write_text(CLIP_TOKENIZER)
    with caplog.at_level(logging.WARNING):
        written = quantize_folder(path, tmp_path / "bare", "int8")
    assert not (written / "tokenizer.json").exists() and "bare is written without a tokenizer" in caplog.text
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "spiece.model").write_bytes(sentencepiece_model())
    written = quantize_folder(path, tmp_path / "whole", "int8")
    assert len({file.stat().st_mode for file in written.iterdir()}) == 1  # others may read the weights too
    assert (written / "spiece.model").read_bytes() == sentencepiece_model() and not (written / "tokenizer.json").exists()


def test_where_none_fits_each_is_named_with_the_reason(tmp_path: Path) -> None:
    path = without_tokenizer(tmp_path / "t5.safetensors")
    (tmp_path / "tokenizer.json").write_text(CLIP_TOKENIZER)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "spiece.model").write_bytes(sentencepiece_model(400) + b"")
    with pytest.raises(TextEncoderError, match="no end token </s>"):
        load_text_encoder(path)


LLAMA = ("<unk>", "<s>", "</s>")
OTHERS = {  # a tokenizer of fitting size -> what is wrong with it
    "Llama's order, json": ("tokenizer.json", lambda: tokenizer_json(LLAMA).encode(), "end token 2 and no padding token"),
    "end and padding exchanged, json": (
        "tokenizer.json", lambda: tokenizer_json(("</s>", "<pad>", "<unk>")).encode(), "end token 0 and padding token 1"),
    "no padding, json": ("tokenizer.json", lambda: tokenizer_json(("<unk>", "</s>")).encode(), "end token 1 and no padding token"),
    "Llama's order": (
        "spiece.model", lambda: sentencepiece_model(pad=-1, end=2, unknown=0, begin=1), "end token 2 and no padding token"),
    "padding last": ("spiece.model", lambda: sentencepiece_model(pad=3, end=1, unknown=0, begin=2), "end token 1 and padding token 3"),
}  # fmt: skip


@pytest.mark.parametrize("place", ["beside", "inside", "given"])
@pytest.mark.parametrize("case", OTHERS)
def test_the_tokenizer_of_another_model_is_refused(tmp_path: Path, case: str, place: str) -> None:
    """Of fitting size; every prompt would end, and every word be, another one than T5 has learned."""
    name, content, problem = OTHERS[case]
    path, file = without_tokenizer(tmp_path / "t5.safetensors"), tmp_path / ("other" if place == "given" else "") / name
    if place == "inside":
        key = "tokenizer_json" if name.endswith(".json") else "spiece_model"
        save_file({**load_file(path), key: torch.frombuffer(bytearray(content()), dtype=torch.uint8)}, path)
    else:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content())
    with pytest.raises(TextEncoderError, match=f"t5.safetensors: .*{problem}, so it is another model's: every T5 has 1 and 0. Give"):
        load_text_encoder(path, tokenizer=file if place == "given" else None)


@pytest.mark.parametrize("place", ["beside", "inside", "given"])
def test_a_tokenizer_json_of_t5_is_taken(tmp_path: Path, place: str) -> None:
    path, content = without_tokenizer(tmp_path / "t5.safetensors"), tokenizer_json().encode()
    if place == "inside":
        save_file({**load_file(path), "tokenizer_json": torch.frombuffer(bytearray(content), dtype=torch.uint8)}, path)
    else:
        (tmp_path / "tokenizer.json").write_bytes(content)
    encoder = load_text_encoder(path, tokenizer=tmp_path / "tokenizer.json" if place == "given" else None)
    assert encoder.tokenizer.encode("a red circle", 20).ids == [3, 4, 5, 1] and encoder.tokenizer.size == 200


def test_sentinels_count_for_nothing(tmp_path: Path) -> None:
    """They are listed last, and may have no row."""
    path = without_tokenizer(tmp_path / "t5.safetensors")
    words = tuple(f"w{i}" for i in range(197))
    made = tokenizers.Tokenizer.from_str(tokenizer_json(words=words))
    made.add_special_tokens([f"<extra_id_{i}>" for i in range(100)])
    made.save(str(tmp_path / "tokenizer.json"))
    assert load_text_encoder(path).tokenizer.size == 200
    made.add_tokens(["<another>"])
    made.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TextEncoderError, match="has 301 tokens, the weights have embeddings for 256.*expected ids below 256"):
        load_text_encoder(path)


def test_the_tokenizer_of_another_model_is_passed_over(tmp_path: Path) -> None:
    path = without_tokenizer(tmp_path / "encoders" / "t5.safetensors")
    (path.parent / "tokenizer.json").write_text(tokenizer_json(LLAMA))
    (tmp_path / "tokenizer.json").write_text(tokenizer_json())
    assert load_text_encoder(path).tokenizer.encode("a red circle", 20).ids == [3, 4, 5, 1]


@pytest.mark.parametrize(
    ("size", "rows", "belongs"),
    [
        (32000, 32128, True),
        (32100, 32128, True),
        (250100, 250112, True),
        (32100, 250112, False),
        (32100, 69328, False),
        (49408, 32128, False),
    ],
)
def test_a_vocabulary_and_an_embedding_that_belong_together(size: int, rows: int, belongs: bool) -> None:
    assert fits(size, rows) is belongs


def test_a_vocabulary_larger_than_the_tokenizer_is_refused(tmp_path: Path) -> None:
    """Such as mT5's, beside T5's tokenizer: every token would be another word."""
    path = without_tokenizer(tmp_path / "mt5.safetensors")
    state = load_file(path)
    state["shared.weight"] = torch.zeros(4000, 32)
    save_file(state, path)
    (tmp_path / "spiece.model").write_bytes(sentencepiece_model())
    with pytest.raises(TextEncoderError, match="spiece.model has .* tokens, the weights have embeddings for 4000: they don't belong"):
        load_text_encoder(path)


@pytest.mark.parametrize(
    "text, words", [("a red \u732b on a \u6905\u5b50", "\u732b \u6905\u5b50"), ("\u043a\u0440\u0430\u0441\u043d\u044b\u0439 \u043a\u0440\u0443\u0433", "\u043a\u0440\u0430\u0441\u043d\u044b\u0439 \u043a\u0440\u0443\u0433"), ("a red circle", ""), ("a \U0001f642 cat", "\U0001f642")]
)
def test_words_without_tokens_are_told(tmp_path: Path, text: str, words: str, caplog) -> None:
    encoder = load_text_encoder(save_t5_file(tiny_t5(), tmp_path / "t5.safetensors"))
    with caplog.at_level(logging.WARNING):
        encoder.encode([text])
    said = [message for message in caplog.messages if "no tokens for" in message]
    assert (said == []) if not words else words in said[0]
