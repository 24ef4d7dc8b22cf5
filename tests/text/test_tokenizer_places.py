"""Where the tokenizer of a T5 is found, and which one can't belong to it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pixart import load_text_encoder
from pixart.errors import TextEncoderError
from pixart.text.tokenizer import fits
from tests.support.tiny_text import save_t5_file, sentencepiece_model, tiny_t5


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


def test_where_none_fits_each_is_named_with_the_reason(tmp_path: Path) -> None:
    path = without_tokenizer(tmp_path / "t5.safetensors")
    (tmp_path / "tokenizer.json").write_text(CLIP_TOKENIZER)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "spiece.model").write_bytes(sentencepiece_model(400) + b"")
    with pytest.raises(TextEncoderError, match="no end token </s>"):
        load_text_encoder(path)


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
    "text, words", [("a red 猫 on a 椅子", "猫 椅子"), ("красный круг", "красный круг"), ("a red circle", ""), ("a 🙂 cat", "🙂")]
)
def test_words_without_tokens_are_told(tmp_path: Path, text: str, words: str, caplog) -> None:
    encoder = load_text_encoder(save_t5_file(tiny_t5(), tmp_path / "t5.safetensors"))
    with caplog.at_level(logging.WARNING):
        encoder.encode([text])
    said = [message for message in caplog.messages if "no tokens for" in message]
    assert (said == []) if not words else words in said[0]
