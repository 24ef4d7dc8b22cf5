"""Tiny random parts of a whole pipeline, as diffusers' modules and as files."""
from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from tests.support.tiny_text import save_t5_folder, sentencepiece_model, tiny_t5

CAPTION_WIDTH = 32


class Parts(NamedTuple):
    """diffusers' and transformers' modules, and the folder they were saved to."""

    folder: Path
    transformer: torch.nn.Module
    vae: torch.nn.Module
    t5: torch.nn.Module


def make_parts(folder: Path, pixels: int = 256, micro: bool = False, scale: float = 0.13025) -> Parts:
    """Saves transformer/, vae/, text_encoder/ and tokenizer/ with random weights (heads of 72)."""
    import diffusers

    torch.manual_seed(1)
    sample = pixels // 8
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=1,
        attention_head_dim=72,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=72,
        caption_channels=CAPTION_WIDTH,
        sample_size=sample,
        interpolation_scale=sample / 2 / 32,
        use_additional_conditions=micro,
    ).eval()
    for parameter in transformer.parameters():  # zero-initialised layers would hide mistakes
        torch.nn.init.normal_(parameter, std=0.08)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
        scaling_factor=scale,
        mid_block_add_attention=False,
    ).eval()
    t5 = tiny_t5(width=CAPTION_WIDTH)
    transformer.save_pretrained(folder / "transformer")
    vae.save_pretrained(folder / "vae")
    save_t5_folder(t5, folder, pipeline=True)
    return Parts(folder, transformer, vae, t5)


def padded_embeddings(t5: torch.nn.Module, prompts: list[str], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """States and mask padded to `length`, as diffusers' pipelines make them."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model(), add_eos=True)
    ids = torch.zeros(len(prompts), length, dtype=torch.long)
    mask = torch.zeros(len(prompts), length, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        found = processor.encode(prompt)
        ids[row, : len(found)] = torch.tensor(found)
        mask[row, : len(found)] = 1
    with torch.no_grad():
        return t5(input_ids=ids, attention_mask=mask).last_hidden_state, mask
