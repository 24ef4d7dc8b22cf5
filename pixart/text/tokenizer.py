"""Prompts to T5 token ids, within a limit, saying what was cut."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

from ..errors import InputError, TextEncoderError
from .files import text_encoder_folder

END_TOKEN, UNKNOWN_TOKEN, PAD_TOKEN = "</s>", "<unk>", "<pad>"
END_ID, PAD_ID = 1, 0  # in every T5
SENTINEL = "<extra_id_"  # begins the names of ids that are never in a prompt
TOKENIZER_FILES = ("tokenizer.json", "spiece.model")
SHOWN = 200  # characters of a message's list of words
WHERE_TO_GET = (
    "Give tokenizer= the folder, tokenizer.json or spiece.model of the T5 these weights belong to; for T5-v1.1-XXL "
    "that is the tokenizer/ folder of PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers on Hugging Face."
)


class Vocabulary(Protocol):
    """What is needed of a tokenizer library."""

    end_id: int
    pad_id: int | None
    unknown_id: int | None  # of what the vocabulary has no tokens for
    size: int

    def ids(self, text: str) -> list[int]:
        """Token ids without the end token."""

    def text(self, ids: list[int]) -> str:
        """The words that ids stand for."""


class TokenizedPrompt(NamedTuple):
    """One prompt, ready for the encoder."""

    ids: list[int]  # ends with the end token
    count: int  # tokens of the whole prompt, end token included, before any cut
    cut: str  # words beyond the limit; "" if none
    unknown: str = ""  # words with characters that the vocabulary has no tokens for; "" if none


class Tokenizer:
    """A T5 tokenizer: adds the end token and keeps it when a prompt is cut."""

    def __init__(self, vocabulary: Vocabulary, source: str) -> None:
        self.vocabulary = vocabulary
        self.source = source

    @property
    def size(self) -> int:
        """Number of ids; the encoder's embedding needs at least as many rows."""
        return self.vocabulary.size

    def encode(self, text: str, max_tokens: int) -> TokenizedPrompt:
        """Ids of `text`, at most `max_tokens` with the end token; raises InputError for a limit below 1."""
        if max_tokens < 1:
            raise InputError(f"max_tokens is {max_tokens}; expected at least 1, for the end token.")
        if not isinstance(text, str):
            raise InputError(f"A prompt is {type(text).__name__}; expected a string.")
        text = whole_characters(text)
        ids = self.vocabulary.ids(text)
        kept, cut = ids[: max_tokens - 1], ids[max_tokens - 1 :]
        unknown = unknown_words(text, ids, self.vocabulary.ids, self.vocabulary.unknown_id)
        return TokenizedPrompt([*kept, self.vocabulary.end_id], len(ids) + 1, self.vocabulary.text(cut) if cut else "", unknown)


def unknown_words(text: str, ids: list[int], ids_of: Callable[[str], list[int]], unknown: int | None) -> str:
    """The words of a text that hold characters without a token, "" if none: to T5, which learned from four
    languages in Latin letters, they are all the same blank. ids: of the text."""
    if unknown is None or unknown not in ids:
        return ""
    found = " ".join(dict.fromkeys(word for word in text.split() if unknown in ids_of(word)))
    return found if len(found) <= SHOWN else found[: SHOWN - 3] + "..."


def whole_characters(text: str) -> str:
    """`text` with "?" for lone surrogates, halves of characters that broken JSON holds and no tokenizer takes."""
    return text.encode(errors="replace").decode()


class SentencePieceVocabulary:
    """A `spiece.model`, read with sentencepiece."""

    def __init__(self, model: bytes, source: str) -> None:
        try:
            import sentencepiece
        except ImportError:
            raise TextEncoderError(f"{source} is a SentencePiece model: `pip install sentencepiece`.") from None
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise TextEncoderError(f"{source} is not a SentencePiece model ({error}). {WHERE_TO_GET}") from None
        self.end_id = self._processor.eos_id()
        self.pad_id = None if self._processor.pad_id() < 0 else self._processor.pad_id()
        self.unknown_id = self._processor.unk_id()
        self.size = self._processor.get_piece_size()
        if self.end_id < 0:
            raise TextEncoderError(f"{source} has no end token {END_TOKEN}; T5 needs one. {WHERE_TO_GET}")

    def ids(self, text: str) -> list[int]:
        """Token ids without the end token."""
        return self._processor.encode(text)

    def text(self, ids: list[int]) -> str:
        """The words that ids stand for."""
        return self._processor.decode(ids)


class JsonVocabulary:
    """The text of a `tokenizer.json`, read with tokenizers; `source` names it in errors."""

    def __init__(self, text: str, source: str) -> None:
        try:
            import tokenizers
        except ImportError:
            raise TextEncoderError(f"{source} needs the tokenizers library: `pip install tokenizers`.") from None
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # tokenizers raises bare Exception for every malformed file
            raise TextEncoderError(f"{source} is not a tokenizer.json ({error}). {WHERE_TO_GET}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        end_id = self._tokenizer.token_to_id(END_TOKEN)
        if end_id is None:
            raise TextEncoderError(f"{source} has no end token {END_TOKEN}, so it is not a T5's. {WHERE_TO_GET}")
        self.end_id = end_id
        self.pad_id = self._tokenizer.token_to_id(PAD_TOKEN)
        self.unknown_id = self._tokenizer.token_to_id(UNKNOWN_TOKEN)
        # T5's 100 sentinels are in the file but never in a prompt, so only the plain vocabulary must fit
        self.size = 1 + max(number for piece, number in self._tokenizer.get_vocab().items() if not piece.startswith(SENTINEL))

    def ids(self, text: str) -> list[int]:
        """Token ids without the end token."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def text(self, ids: list[int]) -> str:
        """The words that ids stand for."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Reads a tokenizer folder (also one holding tokenizer/), a tokenizer.json or a spiece.model."""
    path = Path(path)
    found = find_tokenizer(path)
    if found is None:
        raise TextEncoderError(f"{path}: no tokenizer.json or spiece.model found. {WHERE_TO_GET}")
    try:
        content = found.read_bytes()
    except OSError as error:
        raise TextEncoderError(f"{found} can't be read ({error}). {WHERE_TO_GET}") from None
    return from_json(content, str(found)) if found.suffix == ".json" else from_sentencepiece(content, str(found))


def from_sentencepiece(model: bytes, source: str) -> Tokenizer:
    """A tokenizer from the bytes of a SentencePiece model; `source` names it in errors."""
    return Tokenizer(SentencePieceVocabulary(model, source), source)


def from_json(content: bytes, source: str) -> Tokenizer:
    """A tokenizer from the bytes of a tokenizer.json."""
    return Tokenizer(JsonVocabulary(content.decode("utf-8", errors="replace"), source), source)


def find_tokenizer(path: Path) -> Path | None:
    """The tokenizer file that `path` is or holds, if any."""
    if path.is_file():
        return path
    for folder in (path, path / "tokenizer"):
        for name in TOKENIZER_FILES:
            if (folder / name).is_file():
                return folder / name
    return None


def tokenizer_files(path: Path) -> list[Path]:
    """Every tokenizer that may belong to a T5 file or folder, the likeliest first: inside, beside, and where pipelines have it."""
    folder = text_encoder_folder(path) if path.is_dir() else path.parent
    number = folder.name.removeprefix("text_encoder")  # text_encoder_3 of SD3 has its tokenizer_3
    own = path if path.is_dir() else path.with_suffix("")
    places = [own, folder, folder.parent / f"tokenizer{number}", folder.parent / "tokenizer", folder.parent]
    found = [find_tokenizer(place) for place in places if place.is_dir()]
    return list(dict.fromkeys(file for file in found if file is not None))


def fits(size: int, rows: int) -> bool:
    """Whether a vocabulary of `size` tokens can belong to an embedding of `rows`: T5 leaves some rows unused, but never most."""
    return size <= rows <= 2 * size + 512


def mismatch(tokenizer: Tokenizer, rows: int) -> str:
    """Why a tokenizer can't belong to a T5 with an embedding of `rows`, "" if it can: its ids would mean other words."""
    end, pad = tokenizer.vocabulary.end_id, tokenizer.vocabulary.pad_id
    if (end, pad) != (END_ID, PAD_ID):
        padding = "no padding token" if pad is None else f"padding token {pad}"
        return f"{tokenizer.source} has end token {end} and {padding}, so it is another model's: every T5 has {END_ID} and {PAD_ID}"
    if fits(tokenizer.size, rows):
        return ""
    expected = f"; expected ids below {rows}" if tokenizer.size > rows else ""
    return f"{tokenizer.source} has {tokenizer.size} tokens, the weights have embeddings for {rows}: they don't belong together{expected}"


def tokenizer_beside(path: Path, rows: int) -> Tokenizer | None:
    """The first tokenizer in or near a T5 that can belong to its embedding of `rows`; None if there is none at all.

    Raises TextEncoderError naming those that are there, where none of them can.
    """
    problems = []
    for file in tokenizer_files(path):
        try:
            tokenizer = load_tokenizer(file)
        except TextEncoderError as error:
            problems.append(str(error).replace(WHERE_TO_GET, "").strip())
            continue
        problem = mismatch(tokenizer, rows)
        if not problem:
            return tokenizer
        problems.append(problem)
    if problems:
        raise TextEncoderError(f"{path}: {'; '.join(problems)}. {WHERE_TO_GET}")
    return None
