"""JSON in untrusted files, nested deeper than Python goes: named or passed over, as other nonsense."""
import pytest
import torch
from safetensors.torch import save_file

from pixart.adapters.settings import settings_from_metadata
from pixart.checkpoints.hints import Hints, hints_from_note
from pixart.checkpoints.read import read_checkpoint
from pixart.errors import CheckpointError, TextEncoderError, UnsupportedError
from pixart.json_files import read_json
from pixart.text.embeddings import TextEmbeddings
from pixart.text.prompt_file import load_prompts, save_prompts
from pixart.text.weights import read_t5

DEEP = "[" * 100_000
LIST = "[" * 200 + "]" * 200  # Python reads it, and what is inside is no text


def test_a_file(tmp_path):
    (tmp_path / "config.json").write_text(DEEP)
    with pytest.raises(CheckpointError, match="config.json: not readable as JSON .*recursion"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize("text", [DEEP, LIST])
def test_metadata_of_a_prompt_file(tmp_path, text):
    given = TextEmbeddings(torch.ones(1, 2, 8), torch.ones(1, 2, dtype=torch.bool))
    path = save_prompts(tmp_path / "p.safetensors", given)
    tensors = {"prompt_embeds": given.states, "prompt_attention_mask": torch.ones(1, 2, dtype=torch.uint8)}
    save_file(tensors, path, {"pixart_prompt": "1", **dict.fromkeys(("prompts", "truncated", "token_counts", "settings"), text)})
    found = load_prompts(path)
    assert set(found.prompts) | set(found.embeddings.truncated) <= {""} and found.settings == {} and not found.embeddings.token_counts


def test_mark_of_an_fp8_weight(tmp_path):
    query = "encoder.block.0.layer.0.SelfAttention.q"
    mark = torch.tensor(list(DEEP.encode()), dtype=torch.uint8)
    save_file({f"{query}.weight": torch.zeros(2, 2), f"{query}.comfy_quant": mark}, tmp_path / "t5.safetensors")
    with pytest.raises(UnsupportedError, match="q.comfy_quant is of a quantization made for ComfyUI"):
        read_t5(tmp_path / "t5.safetensors")


def test_config_of_a_t5(tmp_path):
    (tmp_path / "config.json").write_text(DEEP)
    with pytest.raises(TextEncoderError, match="config.json: not readable as JSON"):
        read_t5(tmp_path)


def test_notes_in_headers(tmp_path):
    assert hints_from_note(DEEP) == Hints() and settings_from_metadata(DEEP, "lora") == {}
    header = DEEP.encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match="model.safetensors: its safetensors header is damaged"):
        read_checkpoint(tmp_path / "model.safetensors")
