"""Encoded prompts in a safetensors file: encode once, draw ever after without a T5."""
from __future__ import annotations

import hashlib
import json
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoints.content import SAFETENSORS, content_of, is_out_of_memory, reading_error
from ..errors import InputError
from .embeddings import TextEmbeddings

FORMAT_KEY, FORMAT = "pixart_prompt", "1"
STATES, MASK = "prompt_embeds", "prompt_attention_mask"
STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_SIDE = 65536
WRITERS = "PixArtSavePrompt and python -m pixart encode"
_SAMPLE_ROWS = 64  # of the embedding, for the fingerprint


@dataclass(frozen=True)
class PromptFile:
    """What a prompt file holds."""

    embeddings: TextEmbeddings
    prompts: tuple[str, ...]
    encoder: str  # its fingerprint
    settings: dict[str, Any]  # what else was written: max_tokens and the like


def save_prompts(
    path: str | Path, embeddings: TextEmbeddings, prompts: tuple[str, ...] = (), encoder: str = "", **settings: Any
) -> Path:
    """Writes the embeddings of one or more prompts; the file appears whole or not at all.

    encoder: `fingerprint` of the T5. settings: plain values to keep beside them. Returns the path. Raises OSError.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {
        FORMAT_KEY: FORMAT,
        "prompts": json.dumps(list(prompts), ensure_ascii=False),
        "encoder": encoder,
        "token_counts": json.dumps(list(embeddings.token_counts)),
        "truncated": json.dumps(list(embeddings.truncated), ensure_ascii=False),
        "size": json.dumps(embeddings.size),
        "settings": json.dumps(settings, sort_keys=True),
    }
    tensors = {STATES: embeddings.states.detach().cpu().contiguous(), MASK: embeddings.mask.cpu().to(torch.uint8).contiguous()}
    unfinished = path.parent / f".prompt-{uuid.uuid4().hex}"
    try:
        unfinished.touch()
        mode = unfinished.stat().st_mode  # as the umask says; the writer makes files that only their owner may read
        save_file(tensors, unfinished, metadata)
        unfinished.chmod(mode)
        unfinished.replace(path)
    except SafetensorError as error:
        raise OSError(f"{path} can't be written ({error}); is the disk full?") from None
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def load_prompts(path: str | Path, width: int | None = None) -> PromptFile:
    """Reads a prompt file; raises InputError naming it if it is damaged, something else, or of another encoder width.

    width: channels that the model reads (4096 for the released ones).
    """
    path = Path(path)
    metadata, keys, tensors = _read(path)
    if metadata.get(FORMAT_KEY) != FORMAT or set(tensors) != {STATES, MASK}:
        raise InputError(
            f"{path}: expected a prompt file of format {FORMAT} with {STATES} and {MASK}; found format "
            f"{metadata.get(FORMAT_KEY)} and {', '.join(sorted(keys)[:6]) or 'nothing'}. {WRITERS} write them."
        )
    states, mask = tensors[STATES], tensors[MASK] != 0
    fits = states.ndim == 3 and states.dtype in STATE_DTYPES and 0 not in states.shape and mask.shape == states.shape[:2]
    if not fits or not mask.any(dim=1).all():
        raise InputError(
            f"{path}: states {tuple(states.shape)} in {states.dtype} and mask {tuple(mask.shape)} with {int(mask.sum())} tokens don't "
            "fit; expected fp32, bf16 or fp16 and a token for every prompt. Write it again."
        )
    encoder = metadata.get("encoder", "")
    if width is not None and states.shape[2] != width:
        raise InputError(
            f"{path} was made by an encoder {states.shape[2]} wide ({encoder or 'unknown'}), but this model reads captions "
            f"{width} wide. Encode the prompt again with the T5 that belongs to the model."
        )
    if not torch.isfinite(states).all():
        raise InputError(f"{path}: NaN or infinite values in {STATES}. Write it again.")
    return _assemble(path, states, mask, metadata)


def _read(path: Path) -> tuple[dict[str, str], set[str], dict[str, Tensor]]:
    """Metadata, all keys, and the two tensors as far as they are there; raises InputError naming whatever else the file is."""
    if not path.is_file():
        raise InputError(f"{path}: no such prompt file; check the path.")
    expected = f"a prompt file, as {WRITERS} write"
    if content_of(path, InputError, expected) != SAFETENSORS:
        raise InputError(f"{path}: this is a PyTorch file, which was not opened; here expected {expected}.")
    try:
        with safe_open(str(path), framework="pt") as file:
            keys = set(file.keys())
            return file.metadata() or {}, keys, {key: file.get_tensor(key) for key in (STATES, MASK) if key in keys}
    except Exception as error:
        if is_out_of_memory(error):
            raise reading_error(path, error, InputError) from None
        raise InputError(f"{path} is not a prompt file, or is damaged ({error}). Write it again.") from None


def _assemble(path: Path, states: Tensor, mask: Tensor, metadata: dict[str, str]) -> PromptFile:
    def value(name: str, kind: type, default: Any) -> Any:
        try:
            found = json.loads(metadata.get(name, "null"))
        except (ValueError, RecursionError):
            found = default
        return found if isinstance(found, kind) else default

    def texts(name: str) -> tuple[str, ...]:
        return tuple(text if isinstance(text, str) else "" for text in value(name, list, []))

    counts = tuple(n for n in value("token_counts", list, []) if isinstance(n, int))
    size = value("size", list, None)
    if size is not None and not (len(size) == 2 and all(isinstance(n, int) and 0 < n <= LARGEST_SIDE for n in size)):
        raise InputError(f"{path}: its picture size is {size}; expected height and width in pixels. Write it again.")
    embeddings = TextEmbeddings(
        states, mask, counts, texts("truncated"), size=tuple(size) if size else None, source=str(path)
    )
    return PromptFile(embeddings, texts("prompts"), metadata.get("encoder", ""), value("settings", dict, {}))


def fingerprint(embedding: Tensor, norm: Tensor, layers: int, precision: str) -> str:
    """Names an encoder: sizes, a hash of two of its tensors that quantization leaves alone, and its precision.

    embedding: (vocabulary, width); norm: the last one's weight (width,).
    """
    parts = [part.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8) for part in (embedding[:_SAMPLE_ROWS], norm)]
    digest = hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()[:12]
    return f"t5-{embedding.shape[1]}x{layers}-{digest}-{precision}"
