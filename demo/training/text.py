"""The demo's text encoder: a tiny real T5 that learns to say what a caption states.

`python -m demo.training.text` trains a SentencePiece tokenizer on captions, then T5 together with one
read-out head per attribute (colour, shape, place, relation ...), and keeps the encoder alone.
Minutes on two cores; the heads are thrown away.
"""
from __future__ import annotations

import argparse
import io
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import Linear
from tqdm import tqdm
from transformers import T5Config, T5EncoderModel

from .. import WEIGHTS
from ..data.captions import ATTRIBUTE_CLASSES, attributes, caption
from ..data.scenes import sample_scene

SENTENCES = 40_000
PAD, END = 0, 1


def train_tokenizer(seed: int = 0) -> sentencepiece.SentencePieceProcessor:
    """BPE over training captions, so that each of their words is one token; others fall back to bytes."""
    rng = np.random.default_rng(seed)
    texts = (caption(sample_scene(rng), rng).text for _ in range(SENTENCES))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts, model_writer=model, model_type="bpe", vocab_size=512, byte_fallback=True,
        normalization_rule_name="nmt_nfkc_cf", pad_id=PAD, eos_id=END, unk_id=2, bos_id=-1, minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def encoder_config(vocab_size: int) -> T5Config:
    """T5 v1.1 in small: gated GELU, three layers."""
    return T5Config(
        vocab_size=vocab_size, d_model=128, d_kv=64, d_ff=256, num_layers=3, num_heads=2,
        feed_forward_proj="gated-gelu", dropout_rate=0.0, tie_word_embeddings=False, pad_token_id=PAD, eos_token_id=END,
    )


class AttributeReader(nn.Module):
    """One learned query per attribute pools the tokens; a linear layer names the class."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(len(ATTRIBUTE_CLASSES), width) / math.sqrt(width))
        self.heads = nn.ModuleList(Linear(width, len(classes)) for classes in ATTRIBUTE_CLASSES.values())

    def forward(self, states: Tensor, mask: Tensor) -> list[Tensor]:
        """states: (B, M, D); mask: (B, M) -> logits per attribute, (B, classes)."""
        scores = torch.einsum("ad,bmd->bam", self.queries, states)
        weights = scores.masked_fill(~mask[:, None].bool(), float("-inf")).softmax(-1)
        pooled = torch.einsum("bam,bmd->bad", weights, states)
        return [head(pooled[:, i]) for i, head in enumerate(self.heads)]


def pad_batch(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Token rows -> ids (B, M) and mask (B, M), padded to the longest."""
    length = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return ids, mask


def caption_batches(tokenizer, batch: int, seed: int, split: str = "train") -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Endless (ids, mask, labels (B, attributes))."""
    rng = np.random.default_rng(seed)
    while True:
        rows, labels = [], []
        for _ in range(batch):
            scene = sample_scene(rng, split)
            said = caption(scene, rng)
            rows.append(tokenizer.encode(said.text) + [END])
            labels.append(list(attributes(scene, said.stated).values()))
        yield *pad_batch(rows), torch.tensor(labels)


def train(steps: int, batch: int, seed: int, out: Path) -> None:
    """Trains tokenizer and encoder and writes them, fp16, as one file."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(seed)
    encoder = T5EncoderModel(encoder_config(tokenizer.vocab_size()))
    reader = AttributeReader(encoder.config.d_model)
    parameters = [*encoder.parameters(), *reader.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    batches = caption_batches(tokenizer, batch, seed + 1)
    progress = tqdm(range(steps), desc="text encoder")
    for _ in progress:
        ids, mask, labels = next(batches)
        states = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        states = states + 0.1 * torch.randn_like(states)  # keeps what is said readable through noise
        loss = sum(F.cross_entropy(logits, labels[:, i]) for i, logits in enumerate(reader(states, mask)))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    tqdm.write(f"held-out captions read right, every attribute: {accuracy(encoder, reader, tokenizer):.2%}")
    save(encoder, tokenizer, out)


@torch.no_grad()
def accuracy(encoder, reader, tokenizer, count: int = 1000) -> float:
    """Share of held-out captions whose attributes are all read right."""
    ids, mask, labels = next(caption_batches(tokenizer, count, 12345, "heldout"))
    logits = reader(encoder(input_ids=ids, attention_mask=mask).last_hidden_state, mask)
    read = torch.stack([row.argmax(-1) for row in logits], dim=1)
    return (read == labels).all(1).float().mean().item()


def save(encoder: T5EncoderModel, tokenizer, out: Path) -> None:
    """Hugging Face keys in fp16, with the SentencePiece model in `spiece_model`."""
    weights = {k: v.half().contiguous() for k, v in encoder.state_dict().items() if k != "encoder.embed_tokens.weight"}
    weights["spiece_model"] = torch.frombuffer(bytearray(tokenizer.serialized_model_proto()), dtype=torch.uint8)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, out, metadata={"format": "pt", "title": "PixArt demo T5", "license": "Apache-2.0"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=WEIGHTS["text_encoders"])
    arguments = parser.parse_args()
    train(arguments.steps, arguments.batch, arguments.seed, arguments.out)


if __name__ == "__main__":
    main()
