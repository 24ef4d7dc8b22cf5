"""`python -m pixart merge`: sums in full precision, rounded once, in any layout; or a sentence and no file."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pixart import cli
from pixart.adapters import merge_file
from pixart.adapters.whole import merge_into_file
from pixart.checkpoints import inspect_file, load_transformer
from pixart.errors import CheckpointError, InputError
from tests.support import adapter_factory
from tests.support import checkpoint_factory as factory


def write_base(folder: Path, dtype: torch.dtype = torch.float32, kind: str = "safetensors") -> tuple[Path, dict[str, torch.Tensor]]:
    config, diffusers, original = factory.tiny_weights(dtype=dtype, hidden=72, depth=2)
    return factory.write(kind, folder, config, diffusers, original), original


def write_lora(path: Path, seed: int, module: str = "blocks.0.attn.qkv", rows: int = 216, scale: float = 0.1) -> tuple[Path, torch.Tensor]:
    """A LoRA of rank 4 and alpha 2 on one layer, and what it adds, in double precision."""
    order = torch.Generator().manual_seed(seed)
    up, down = torch.randn(rows, 4, generator=order) * scale, torch.randn(4, 72, generator=order) * scale
    save_file({f"diffusion_model.{module}.lora_up.weight": up, f"diffusion_model.{module}.lora_down.weight": down,
               f"diffusion_model.{module}.alpha": torch.tensor(2.0)}, path)  # fmt: skip
    return path, 0.5 * up.double() @ down.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_of_several_are_rounded_once(tmp_path: Path, dtype: torch.dtype) -> None:
    base, weights = write_base(tmp_path, dtype)
    first, one = write_lora(tmp_path / "1.safetensors", 1)
    second, two = write_lora(tmp_path / "2.safetensors", 2)
    written, lines = merge_into_file(base, [first, second], tmp_path / "out.safetensors", [0.7, -1.3])
    found = load_file(written)
    assert found.keys() == weights.keys() and len(lines) == 2
    assert lines[0].startswith("1.safetensors: 3 of 3 keys applied (1 layers, LoRA, rank 4)") and lines[1].endswith("strength -1.3")
    key = "blocks.0.attn.qkv.weight"
    exact = weights[key].double() + 0.7 * one - 1.3 * two
    unit = torch.finfo(dtype).eps / 2 * exact.abs()  # half a step of the dtype, and what fp32 loses on the way
    assert ((found[key].double() - exact).abs() <= unit * 1.01 + 1e-6).all()
    assert all(torch.equal(value, weights[name]) for name, value in found.items() if name != key)
    with safe_open(str(written), framework="pt") as opened:
        assert json.loads(opened.metadata()["pixart.merged"]) == {"base": "model.safetensors", "adapters": [["1.safetensors", 0.7], ["2.safetensors", -1.3]]}


@pytest.mark.parametrize("name", adapter_factory.FORMATS)
def test_every_format_equals_sums_by_hand(tmp_path: Path, name: str) -> None:
    base, weights = write_base(tmp_path)
    adapter = adapter_factory.make(name, weights)
    save_file(adapter.tensors, tmp_path / "style.safetensors")
    written, _ = merge_into_file(base, [tmp_path / "style.safetensors"], tmp_path / "out.safetensors", [0.6])
    found = load_file(written)
    for key, value in adapter.merged(weights, 0.6).items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["pth", "diffusers-folder", "safetensors"])
@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_the_command_line_writes_what_python_merges(tmp_path: Path, capsys: pytest.CaptureFixture, kind: str, layout: str) -> None:
    base, _ = write_base(tmp_path / "base", kind=kind)
    lora, _ = write_lora(tmp_path / "style.safetensors", 1)
    out = tmp_path / ("folder" if layout == "diffusers" else "out.safetensors")
    assert cli.main(["merge", str(base), str(lora), "--output", str(out), "--strength", "0.5", "--to", layout]) == 0
    said = capsys.readouterr()
    assert said.out == f"{out}\n" and "3 of 3 keys applied" in said.err
    expected = load_transformer(base)
    merge_file(lora, 0.5, expected, None)
    merged = load_transformer(out)
    for name, value in expected.state_dict().items():
        assert torch.equal(merged.state_dict()[name], value), name
    assert inspect_file(out).config == inspect_file(base).config


def test_fp8_becomes_bf16_and_a_dtype_can_be_chosen(tmp_path: Path) -> None:
    base, weights = write_base(tmp_path)
    small = {name: value.to(torch.float8_e4m3fn) if name.startswith("blocks") else value.bfloat16() for name, value in weights.items()}
    save_file(small, tmp_path / "small.safetensors")
    lora, _ = write_lora(tmp_path / "style.safetensors", 1)
    out, _ = merge_into_file(tmp_path / "small.safetensors", [lora], tmp_path / "out.safetensors")
    assert {value.dtype for value in load_file(out).values()} == {torch.bfloat16}
    out, _ = merge_into_file(base, [lora], tmp_path / "half.safetensors", dtype=torch.float16)
    assert {value.dtype for value in load_file(out).values()} == {torch.float16}


def test_layers_of_t5_are_an_error_unless_they_are_left_out(tmp_path: Path) -> None:
    base, _ = write_base(tmp_path)
    lora, _ = write_lora(tmp_path / "style.safetensors", 1)
    layer = "lora_te_encoder_block_0_layer_0_SelfAttention_q"
    save_file({**load_file(lora), f"{layer}.lora_up.weight": torch.ones(32, 1), f"{layer}.lora_down.weight": torch.ones(1, 32)}, lora)
    with pytest.raises(CheckpointError, match="2 of 5 keys can't be applied.*--leave-text.*for T5"):
        merge_into_file(base, [lora], tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
    written, lines = merge_into_file(base, [lora], tmp_path / "out.safetensors", leave_text=True)
    assert written.is_file() and "not applied: 2 for T5" in lines[0]


def test_bad_orders_are_sentences_and_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    base, _ = write_base(tmp_path, torch.float16)
    lora, _ = write_lora(tmp_path / "style.safetensors", 1)
    out = tmp_path / "out.safetensors"
    for arguments, message in (
        ({"strengths": [1.0, 2.0]}, "2 strengths for 1 LoRAs; expected one for all, or one each"),
        ({"strengths": [float("nan")]}, "A strength is nan; expected a number from -100 to 100"),
        ({"to": "kohya"}, "unknown layout 'kohya'; expected one of original, diffusers"),
        ({"dst": base}, "is one of the sources; choose another destination"),
        ({"adapters": []}, "No LoRA was given"),
    ):
        with pytest.raises(InputError, match=message):
            merge_into_file(**{"base": base, "adapters": [lora], "dst": out, **arguments})
    huge, _ = write_lora(tmp_path / "huge.safetensors", 1, scale=300.0)
    with pytest.raises(CheckpointError, match=r"blocks.0.attn.qkv.weight would hold numbers beyond torch.float16; choose --dtype bf16 or fp32"):
        merge_into_file(base, [huge], out)
    assert cli.main(["merge", str(base), str(base), "--output", str(out)]) == 2
    assert "not a LoRA" in capsys.readouterr().err
    other, _ = write_lora(tmp_path / "other.safetensors", 1, "blocks.0.mlp.fc1", rows=99)
    with pytest.raises(CheckpointError, match="made for another model"):
        merge_into_file(base, [lora, other], out)
    assert not out.exists() and sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["huge.safetensors", "model.safetensors", "other.safetensors", "style.safetensors"]
    )
