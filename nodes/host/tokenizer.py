"""A T5's own tokenizer (in its file, or in its folder) behind the host's tokenizer class."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.sd1_clip
import comfy.text_encoders.pixart_t5 as pixart_t5
import tokenizers
from comfy.text_encoders.spiece_tokenizer import SPieceTokenizer

from ...pixart.errors import TextEncoderError
from ...pixart.text.tokenizer import END_TOKEN, WHERE_TO_GET, from_sentencepiece
from ...pixart.text.weights import T5Weights

END_ID = 1  # in the host's T5 classes, and in every T5
T5_VOCABULARY = 32100  # ids that the host's own T5 tokenizer can give


class JsonTokenizer:
    """A tokenizer.json, called as the host calls its tokenizers."""

    def __init__(self, path: str) -> None:
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(path)
        except Exception as error:  # tokenizers raises bare Exception for every malformed file
            raise TextEncoderError(f"{path} is not a tokenizer.json ({error}). {WHERE_TO_GET}") from None
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        if self.tokenizer.token_to_id(END_TOKEN) is None:
            raise TextEncoderError(f"{path} has no end token {END_TOKEN}, so it is not a T5's. {WHERE_TO_GET}")

    @classmethod
    def from_pretrained(cls, path: str) -> JsonTokenizer:
        """The host's way to construct one."""
        return cls(path)

    def __call__(self, text: str) -> dict[str, list[int]]:
        """Ids of the text, then the end token."""
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return {"input_ids": [*ids, self.tokenizer.token_to_id(END_TOKEN)]}

    def get_vocab(self) -> dict[str, int]:
        """Piece -> id."""
        return self.tokenizer.get_vocab()

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        """The text that ids stand for."""
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)


def tokenizer_class(weights: T5Weights, file: Path | None) -> type:
    """A class for the host to instantiate: the SentencePiece model inside the weights, the folder's file, or the host's own.

    Raises TextEncoderError for a damaged one, and where its ids don't fit the weights.
    """
    source, kind = _source(weights, file)
    # The class lives as long as the CLIP: it must not name `weights`, which may hold all tensors of the file
    path, width, rows = weights.path, int(weights.config["d_model"]), int(weights.config["vocab_size"])
    if source is None and rows < T5_VOCABULARY:
        raise TextEncoderError(
            f"{path}: has {rows} token embeddings and no tokenizer of its own; T5's common tokenizer needs "
            f"{T5_VOCABULARY}. Give the folder with its spiece.model, or a file with the `spiece_model` tensor."
        )

    class T5Tokenizer(comfy.sd1_clip.SDTokenizer):
        """No padding, as in the host's PixArt tokenizer."""

        def __init__(self, embedding_directory: Any = None, tokenizer_data: dict[str, Any] = {}) -> None:  # noqa: B006
            super().__init__(
                source,
                embedding_directory=embedding_directory,
                pad_with_end=False,
                embedding_size=width,
                embedding_key="t5xxl",
                tokenizer_class=kind,
                has_start_token=False,
                pad_to_max_length=False,
                max_length=99999999,
                min_length=1,
                tokenizer_data=tokenizer_data,
            )
            _check(self, path, rows)

        def state_dict(self) -> dict[str, Any]:
            """Saved with the encoder, so that it stays complete."""
            return {"spiece_model": self.tokenizer.serialize_model()} if kind is SPieceTokenizer else {}

    class HostTokenizer(pixart_t5.T5XXLTokenizer):
        """The host's, with embeddings of this encoder's width."""

        def __init__(self, embedding_directory: Any = None, tokenizer_data: dict[str, Any] = {}) -> None:  # noqa: B006
            super().__init__(embedding_directory=embedding_directory, tokenizer_data=tokenizer_data)
            self.embedding_size = width

    chosen = T5Tokenizer if source else HostTokenizer

    class PixArtTokenizer(comfy.sd1_clip.SD1Tokenizer):
        """One stream, `t5xxl`."""

        def __init__(self, embedding_directory: Any = None, tokenizer_data: dict[str, Any] = {}) -> None:  # noqa: B006
            super().__init__(
                embedding_directory=embedding_directory,
                tokenizer_data=tokenizer_data,
                clip_name="t5xxl",
                tokenizer=chosen,
            )

    return PixArtTokenizer


def _source(weights: T5Weights, file: Path | None) -> tuple[Any, type]:
    """What the host builds a tokenizer of (None: its own), and the class; the host itself would fail on damaged ones without a name."""
    model, name = weights.sentencepiece, f"{weights.path} (spiece_model)"
    if model is None and file is not None:
        if file.suffix == ".json":
            return str(file), JsonTokenizer
        model, name = file.read_bytes(), str(file)
    if model is not None:
        from_sentencepiece(model, name)
    return model, SPieceTokenizer


def _check(tokenizer: Any, path: Path, rows: int) -> None:
    highest = max(tokenizer.inv_vocab, default=0)
    # tokenizer.json also lists T5's 100 sentinels, which prompts never produce
    plain = max((i for i, piece in tokenizer.inv_vocab.items() if not piece.startswith("<extra_id_")), default=highest)
    if tokenizer.end_token != END_ID or plain >= rows:
        raise TextEncoderError(
            f"{path}: its tokenizer has ids up to {plain} and end token {tokenizer.end_token}; expected ids "
            f"below {rows}, the rows of the embedding, and end token {END_ID}. {WHERE_TO_GET}"
        )
