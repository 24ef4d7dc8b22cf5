"""A random vision-language model of a hundred thousand parameters, saved as a folder through transformers' own classes."""
from __future__ import annotations

from pathlib import Path

import torch

IMAGE, START, END = "<|image_pad|>", "<|vision_start|>", "<|vision_end|>"
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", START, END, IMAGE, "<|video_pad|>"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}" + START + IMAGE + END + "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(folder: Path) -> dict[str, int]:
    """A tokenizer whose words are bytes; the ids of the control tokens."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(CONTROL)
    made.save(str(folder / "tokenizer.json"))
    # Before 5 the processor insisted on the model's own class
    old = transformers.__version__.startswith("4.")
    kind = transformers.Qwen2TokenizerFast if old else transformers.PreTrainedTokenizerFast
    wrapped = kind(tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token=None)
    wrapped.save_pretrained(folder)
    return {token: made.token_to_id(token) for token in CONTROL}


def save_vlm(folder: Path, seed: int = 0) -> Path:
    """Writes a Qwen2.5-VL."""
    from transformers import (
        AutoTokenizer,
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
    )

    folder.mkdir(parents=True, exist_ok=True)
    ids = byte_tokenizer(folder)
    size = len(ids) + 256
    text = {
        "vocab_size": size, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 4096, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
        "bos_token_id": None, "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"], "tie_word_embeddings": False,
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32, "fullatt_block_indexes": [1],
        "patch_size": 14, "spatial_merge_size": 2, "window_size": 56,
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        **text, vision_config=vision, image_token_id=ids[IMAGE], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids[START], vision_end_token_id=ids[END],
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    images = Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=112 * 112)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = Qwen2_5_VLProcessor(images, tokenizer, **_video_part(), chat_template=TEMPLATE)
    processor.save_pretrained(folder)
    return folder


def save_blip(folder: Path, seed: int = 0) -> Path:
    """Writes a BLIP, a captioner without dialogue."""
    from transformers import BertTokenizerFast, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

    folder.mkdir(parents=True, exist_ok=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "what", "is", "it", "that", "there", "?", "a", "red", "wall"]
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"vocab_size": len(words), "pad_token_id": 0, "sep_token_id": 3, "eos_token_id": 3, "bos_token_id": 5}
    torch.manual_seed(seed)
    text, vision = {**small, **ids, "encoder_hidden_size": 32}, {**small, "image_size": 32, "patch_size": 16}
    BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), BertTokenizerFast.from_pretrained(folder)).save_pretrained(folder)
    return folder


def _video_part() -> dict:
    """Newer processors also want one for films."""
    try:
        from transformers import Qwen2VLVideoProcessor
    except ImportError:
        return {}
    return {"video_processor": Qwen2VLVideoProcessor()}
