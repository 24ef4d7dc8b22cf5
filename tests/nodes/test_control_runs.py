"""What a PixArt ControlNet keeps, asks for and leaves behind: runs that end early, dtypes, files, memory, waits for the card."""
from __future__ import annotations

import gc
import weakref
from pathlib import Path

import comfy.model_management as management
import comfy.sampler_helpers
import pytest
import torch
from safetensors.torch import save_file

import nodes as host_nodes
from tests.nodes.test_controlnet import MeanVae, applied, picture
from tests.support import host
from tests.support.host_models import captions, load_model, sample
from tests.support.tiny_control import original_keys, reference_control

errors = host.pack_module("pixart.errors")
loader = host.pack_module("nodes.host.controlnet")


@pytest.fixture
def control_file(tmp_path):
    """Two blocks, in fp32."""
    save_file(original_keys(reference_control(144, 2)), tmp_path / "control.safetensors")
    return tmp_path / "control.safetensors"


@pytest.fixture
def control(control_file):
    """As CONTROL_NET."""
    return loader.load_control(str(control_file))


def interrupt(*_: object) -> None:
    """As the host does when the user stops a run."""
    raise management.InterruptProcessingException


@pytest.mark.parametrize("ended_by", [interrupt, None], ids=["interrupted", "completed"])
def test_a_cached_conditioning_does_not_keep_the_model(control, sigma_file, monkeypatch, ended_by) -> None:
    """The host keeps the conditioning with the CONTROL_NET, and calls no `cleanup` after a run that was stopped."""
    model = load_model(sigma_file)
    conditioning = applied(control)
    network, weights = weakref.ref(model.model), weakref.ref(model.model.diffusion_model.blocks[0].attn.qkv.weight)
    if ended_by is None:
        sample(model, *conditioning, steps=1)
    else:
        with monkeypatch.context() as patch, pytest.raises(management.InterruptProcessingException):
            patch.setattr(type(control.control_model), "forward", ended_by)
            sample(model, *conditioning, steps=1)
    del model
    management.cleanup_models_gc()
    gc.collect()
    assert network() is None and weights() is None
    sample(load_model(sigma_file), *conditioning, steps=1)  # and it serves the next one


def test_the_dtype_is_the_hosts_choice(control_file, monkeypatch) -> None:
    """As for the host's own ControlNets: fp32 files take half the memory on cards that compute in fp16."""
    asked = {}

    def choose(**arguments):
        asked.update(arguments)
        return torch.float16

    monkeypatch.setattr(management, "unet_dtype", choose)
    model = loader.load_control(str(control_file)).control_model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert asked["weight_dtype"] == torch.float32 and torch.float16 in asked["supported_dtypes"]


def test_weights_in_fp16_draw_nearly_the_same(sigma, control, control_file, monkeypatch) -> None:
    """They are cast to what the model computes in."""
    expected = sample(sigma, *applied(control), steps=1)
    monkeypatch.setattr(management, "unet_dtype", lambda **_: torch.float16)
    found = sample(sigma, *applied(loader.load_control(str(control_file))), steps=1)
    assert 0 < float((found - expected).norm() / expected.norm()) < 1e-2


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_the_file_is_let_go(tmp_path, ending: str) -> None:
    """Weights are copies: a mapped file can't be replaced on Windows."""
    tensors, path = original_keys(reference_control(144, 2)), tmp_path / f"control.{ending}"
    save_file(tensors, path) if ending == "safetensors" else torch.save(tensors, path)
    model = loader.load_control(str(path)).control_model
    gc.collect()
    if Path("/proc/self/maps").exists():
        assert str(path) not in Path("/proc/self/maps").read_text(encoding="utf-8")
    before = [parameter.clone() for parameter in model.parameters()]
    path.write_bytes(b"\0" * path.stat().st_size)
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), before, strict=True))


def estimated(model, positive, negative, latent=(1, 4, 16, 24)) -> tuple[int, int]:
    """The host's estimate (most, least) for sampling on a latent of this shape, in bytes."""
    conds = {"positive": comfy.sampler_helpers.convert_cond(positive), "negative": comfy.sampler_helpers.convert_cond(negative)}
    return tuple(map(int, comfy.sampler_helpers.estimate_memory(model, latent, conds)))


def test_residuals_are_in_the_memory_estimate(sigma, control) -> None:
    """Of the latent's size, whatever the hint's: tokens x width x blocks x 4 bytes, for prompt and negative and for one of them."""
    plain = estimated(sigma, captions(5), captions(3))
    one = applied(control, image=picture(32, 32))
    residuals = (8 * 12) * 144 * 2 * 4
    assert estimated(sigma, *one) == (plain[0] + 2 * residuals, plain[1] + residuals)
    two = applied(control, 0.5, positive=one[0], negative=one[1])
    assert estimated(sigma, *two) == (plain[0] + 6 * residuals, plain[1] + 3 * residuals)  # each one's, and the sums
    odd = estimated(sigma, *one, latent=(3, 4, 5, 7))[1] - estimated(sigma, captions(5), captions(3), latent=(3, 4, 5, 7))[1]
    assert odd == 3 * (3 * 4) * 144 * 2 * 4


def test_the_estimate_is_what_sampling_reserves(sigma, control, monkeypatch) -> None:
    asked = []
    original = management.load_models_gpu

    def load(models, *args, **kwargs):
        asked.append(kwargs.get("memory_required", 0))
        return original(models, *args, **kwargs)

    monkeypatch.setattr(management, "load_models_gpu", load)
    sample(sigma, captions(5), captions(3, seed=1), steps=1)
    sample(sigma, *applied(control), steps=1)
    assert max(asked[1:]) - asked[0] == 2 * 16 * 144 * 2 * 4


def test_the_hint_lies_where_the_model_samples_and_is_encoded_once(sigma, control) -> None:
    """On a card it would be copied there in every step otherwise; "meta" stands in for one."""
    control.cond_hint_original, control.vae = picture().movedim(-1, 1), MeanVae()
    control.pre_run(sigma.model, lambda percent: 1.0 - percent)
    first, second = (control._hint(torch.zeros(2, 4, 8, 8, device="meta"), 2) for _ in range(2))
    assert first.device.type == "meta" and len(control.vae.sizes) == 1
    assert first._base is second._base is control._hints[8, 8]
    control.cleanup()
    assert control._hints == {} and control._running is None


class Unread:
    """A noise level on a card: reading it is a wait."""

    reads = 0

    def __getitem__(self, index: int) -> torch.Tensor:
        self.reads += 1
        return torch.tensor(3.0)


@pytest.mark.parametrize(
    ("percents", "sigmas", "on", "reads"),
    [((0.0, 1.0), (1e9, 0.0), True, 0), ((0.0, 0.5), (1e9, 2.0), True, 1), ((0.0, 0.5), (1e9, 4.0), False, 1),
     ((0.5, 1.0), (2.0, 0.0), False, 1), ((0.5, 0.5), (3.0, 3.0), True, 1), ((0.6, 0.4), (2.0, 4.0), False, 1)],
)  # fmt: skip
def test_the_card_is_waited_for_only_where_there_is_a_range(control, percents, sigmas, on: bool, reads: int) -> None:
    control.timestep_percent_range, control.timestep_range, level = percents, sigmas, Unread()
    assert control._is_on(level) is on and level.reads == reads


def test_several_in_a_row_with_strengths_and_ranges_that_switch_some_off(sigma, control) -> None:
    """Chained ones that are off, or of strength 0, leave the others as they are alone."""
    alone = sample(sigma, *applied(control, 0.7))
    first = applied(control, 0.7)
    never = host_nodes.ControlNetApplyAdvanced().apply_controlnet(*first, control, picture(seed=3), 1.0, 0.9999, 0.9999, vae=MeanVae())
    assert torch.equal(sample(sigma, *never), alone)
    none = host_nodes.ControlNetApplyAdvanced().apply_controlnet(*first, control, picture(seed=3), 0.0, 0.0, 1.0, vae=MeanVae())
    assert torch.equal(sample(sigma, *none), alone)


def test_the_node_that_knows_no_vae(sigma, control) -> None:
    positive, = host_nodes.ControlNetApply().apply_controlnet(captions(4), control, picture(), 1.0)
    with pytest.raises(errors.InputError, match="connect the model's VAE to `vae` of ControlNetApplyAdvanced"):
        sample(sigma, positive, captions(1), steps=1)
