"""A T5 with random weights and a SentencePiece tokenizer of a few hundred words, made in a second."""
from __future__ import annotations

import io
from functools import cache
from pathlib import Path

import torch

WORDS = (
    "a an the red green blue yellow purple orange small large tiny circle square triangle star ring above below left "
    "right of inside on plain background with and picture drawing cat dog sits under tree near house by sea at night"
).split()


@cache
def sentencepiece_model(vocab_size: int = 200, pad: int = 0, end: int = 1, unknown: int = 2, begin: int = -1) -> bytes:
    """Bytes of a unigram model, by default with T5's ids; -1 for none."""
    import sentencepiece

    order = torch.Generator().manual_seed(0)
    lines = []
    for _ in range(600):
        picks = torch.randint(len(WORDS), (9,), generator=order)
        lines.append(" ".join(WORDS[i] for i in picks))
    target = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=target,
        vocab_size=vocab_size,
        pad_id=pad,
        eos_id=end,
        unk_id=unknown,
        bos_id=begin,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
    )
    return target.getvalue()


def tokenizer_json(first: tuple[str, ...] = ("<pad>", "</s>", "<unk>"), words: tuple[str, ...] = ("a", "red", "circle")) -> str:
    """A tokenizer.json of 200 words with these ids first, by default T5's."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    pieces = [*first, *(f"\u2581{word}" for word in words)]
    pieces += [f"word{i}" for i in range(len(pieces), 200)]
    made = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    return made.to_str()


def tiny_t5(width: int = 32, layers: int = 2, gated: bool = True, d_kv: int = 8, seed: int = 0, feed_forward: int | None = None):
    """A random T5EncoderModel of transformers; feed_forward: by default twice the width."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=256,
        d_model=width,
        d_kv=d_kv,
        d_ff=feed_forward or 2 * width,
        num_layers=layers,
        num_heads=4,
        feed_forward_proj="gated-gelu" if gated else "relu",
    )
    return T5EncoderModel(config).eval()


def save_t5_file(model, path: Path, tokenizer: bool = True, dtype: torch.dtype = torch.float32) -> Path:
    """Writes a single safetensors file as ComfyUI users have them, by default with the tokenizer inside."""
    from safetensors.torch import save_file

    tensors = {key: value.to(dtype).contiguous().clone() for key, value in model.state_dict().items()}
    tensors.pop("encoder.embed_tokens.weight", None)
    if tokenizer:
        tensors["spiece_model"] = torch.frombuffer(bytearray(sentencepiece_model()), dtype=torch.uint8)
    save_file(tensors, str(path))
    return path


def save_t5_folder(model, folder: Path, shard: str | None = None, pipeline: bool = False) -> Path:
    """Writes a Hugging Face folder, or a pipeline's with text_encoder/ and tokenizer/."""
    weights, tokenizer = (folder / "text_encoder", folder / "tokenizer") if pipeline else (folder, folder)
    for place in (weights, tokenizer):
        place.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(weights, **({"max_shard_size": shard} if shard else {}))
    (tokenizer / "spiece.model").write_bytes(sentencepiece_model())
    return folder


def save_slim_xxl(path: Path) -> Path:
    """A file with the layer count, feed-forward width and vocabulary of XXL, otherwise tiny, in fp16."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    config = T5Config(vocab_size=32128, d_model=16, d_kv=4, d_ff=10240, num_layers=24, num_heads=4, feed_forward_proj="gated-gelu")
    return save_t5_file(T5EncoderModel(config), path, tokenizer=False, dtype=torch.float16)
