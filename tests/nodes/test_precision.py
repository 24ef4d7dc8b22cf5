"""16-bit files compute in bf16 on CPUs that have instructions for it, where the host alone would take fp32."""
from __future__ import annotations

from pathlib import Path

import comfy.cli_args
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import host
from tests.support.host_models import captions, difference, load_model, sample
from tests.support.tiny_control import original_keys, reference_control

pytestmark = pytest.mark.skipif(host.on_card(), reason="of CPUs")
dtypes = host.pack_module("nodes.host.dtypes")
F32, BF16, F16, FP8 = torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn


@pytest.fixture(params=[True, False], ids=["bf16 instructions", "none"])
def fast(request, monkeypatch) -> bool:
    monkeypatch.setattr(dtypes, "bf16_instructions", lambda: "avx512_bf16" if request.param else "")
    return request.param


def stored_as(file: Path, folder: Path, dtype: torch.dtype) -> Path:
    save_file({key: value.to(dtype) for key, value in load_file(file).items()}, folder / "m.safetensors")
    return folder / "m.safetensors"


def precision(model) -> tuple[torch.dtype, torch.dtype | None]:
    """What weights are kept in, and what they are cast to if that is another."""
    return model.model.get_dtype(), model.model.manual_cast_dtype


@pytest.mark.parametrize(("stored", "menu", "expected", "slow"), [
    (F16, "default", (BF16, None), (F32, None)),
    (BF16, "default", (BF16, None), (F32, None)),
    (F32, "default", (F32, None), (F32, None)),
    (F16, "fp32", (F32, None), (F32, None)),
    (F16, "fp16", (F16, BF16), (F16, F32)),
    (F32, "bf16", (BF16, None), (BF16, F32)),
    (BF16, "fp8_e4m3fn", (FP8, BF16), (FP8, F32)),
])  # fmt: skip
def test_files_and_choices(fast: bool, sigma_file: Path, tmp_path: Path, stored, menu: str, expected, slow) -> None:
    model = load_model(stored_as(sigma_file, tmp_path, stored), weight_dtype=menu)
    assert precision(model) == (expected if fast else slow)
    assert model.model.diffusion_model.blocks[0].attn.qkv.weight.dtype == precision(model)[0]


@pytest.mark.parametrize("argument", ["fp32_unet", "force_fp32"])
def test_the_hosts_own_arguments_hold(monkeypatch, sigma_file: Path, tmp_path: Path, argument: str) -> None:
    monkeypatch.setattr(dtypes, "bf16_instructions", lambda: "avx512_bf16")
    monkeypatch.setattr(comfy.cli_args.args, argument, True)
    assert precision(load_model(stored_as(sigma_file, tmp_path, F16))) == (F32, None)


def test_the_picture_stays_and_a_node_changes_it_back(monkeypatch, sigma_file: Path, tmp_path: Path) -> None:
    """ModelComputeDtype, which newer hosts have, is the user's word too."""
    path = stored_as(sigma_file, tmp_path, F16)
    given = captions(5), captions(2, seed=1)
    pictures = {}
    for fast in (True, False):
        monkeypatch.setattr(dtypes, "bf16_instructions", lambda fast=fast: "avx512_bf16" if fast else "")
        model = load_model(path)
        pictures[fast] = sample(model, *given)
    assert 1e-6 < difference(pictures[True], pictures[False]) < 3e-2
    monkeypatch.setattr(dtypes, "bf16_instructions", lambda: "avx512_bf16")
    wide = load_model(path)
    wide.set_model_compute_dtype(F32)
    assert difference(sample(wide, *given), pictures[False]) < difference(pictures[True], pictures[False])


def test_a_controlnet_is_kept_as_the_model(fast: bool, tmp_path: Path) -> None:
    save_file({key: value.half() for key, value in original_keys(reference_control(144, 1)).items()}, tmp_path / "c.safetensors")
    control = host.pack_module("nodes.host.controlnet").load_control(str(tmp_path / "c.safetensors"))
    assert {each.dtype for each in control.control_model.parameters()} == {BF16 if fast else F32}


def test_on_a_cpu_torchs_kernel_attends_unless_the_host_is_told_otherwise(monkeypatch) -> None:
    """The host's default there cuts attention into slices, and takes twice the time."""
    attention = host.pack_module("nodes.host.attention")
    monkeypatch.setattr(attention.host, "optimized_attention", attention.host.attention_sub_quad)
    seen, real = [], attention.torch_attention
    monkeypatch.setattr(attention, "torch_attention", lambda q, *given, **options: (seen.append(q.shape), real(q, *given, **options))[1])
    q, k, v = (torch.randn(2, length, 32, generator=torch.Generator().manual_seed(length)) for length in (9, 5, 5))
    mask = torch.arange(5)[None] < torch.tensor([[5], [2]])
    found = attention.host_attention(q, k, v, heads=4, mask=mask)
    assert seen == [(2, 9, 32)]
    nothing = torch.zeros(2, 5, dtype=torch.bool)  # a caption without a real token
    expected = attention.host.attention_sub_quad(q, k, v, 4, mask=attention.additive_mask(nothing, q.dtype))
    assert difference(attention.host_attention(q, k, v, heads=4, mask=nothing), expected) < 1e-6
    del seen[1:]
    override = {"optimized_attention_override": lambda function, *given, **options: function(*given, **options) * 2}
    assert difference(attention.host_attention(q, k, v, heads=4, mask=mask, options=override), 2 * found) < 1e-6 and len(seen) == 1
    monkeypatch.setattr(comfy.cli_args.args, "use_quad_cross_attention", True)
    assert difference(found, attention.host_attention(q, k, v, heads=4, mask=mask)) < 1e-6 and len(seen) == 1
