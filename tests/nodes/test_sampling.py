"""What people do with a MODEL, through the host's own samplers: guidance, img2img, inpainting, odd sizes."""
from __future__ import annotations

import comfy.latent_formats
import latent_preview
import pytest
import torch
from comfy_extras import nodes_easycache, nodes_model_advanced

import nodes as host_nodes
from tests.support import host, host_models
from tests.support.host_models import captions, difference, noise, sample

errors = host.pack_module("pixart.errors")


@pytest.fixture
def counted(sigma, monkeypatch: pytest.MonkeyPatch):
    """The tiny Sigma, and a list with (batch, caption tokens, has mask) of each forward pass."""
    calls = []
    network = sigma.model.diffusion_model
    original = network._denoise

    def count(x, timesteps, context, context_mask, *rest):
        calls.append((x.shape[0], context.shape[1], context_mask is not None))
        return original(x, timesteps, context, context_mask, *rest)

    monkeypatch.setattr(network, "_denoise", count)
    return sigma, calls


@pytest.mark.parametrize(("prompt", "negative"), [(7, 1), (1, 12), (301, 2), (13, 7)])
def test_prompts_of_unequal_length_take_one_forward_per_step(counted, prompt: int, negative: int) -> None:
    model, calls = counted
    sample(model, captions(prompt), captions(negative, seed=1), steps=4)
    assert calls == [(2, max(prompt, negative), True)] * 4


def test_prompts_of_equal_length_need_no_mask(counted) -> None:
    model, calls = counted
    sample(model, captions(5), captions(5, seed=1), steps=2)
    assert calls == [(2, 5, False)] * 2


def test_without_guidance_there_is_one_prompt_and_no_mask(counted) -> None:
    model, calls = counted
    sample(model, captions(5), captions(2, seed=1), steps=2, cfg=1.0)
    assert calls == [(1, 5, False)] * 2


def test_three_combined_prompts_share_one_forward(counted) -> None:
    model, calls = counted
    sample(model, [*captions(5), *captions(9, seed=2)], captions(1, seed=1), steps=1)
    assert calls == [(3, 9, True)]


def test_batching_changes_nothing(sigma, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guided by both prompts in one pass, or in two: the same picture."""
    conds = host.pack_module("nodes.host.conds")
    together = sample(sigma, captions(11), captions(3, seed=1))
    monkeypatch.setattr(conds.CaptionStates, "can_concat", lambda self, other: False)
    apart = sample(sigma, captions(11), captions(3, seed=1))
    assert difference(together, apart) < 1e-5


class TestWhetherAMaskIsNeeded:
    """On the meta device a look at the values, which would stall a GPU at every step, raises."""

    def mask(self, tokens: int, all_real: bool):
        conds = host.pack_module("nodes.host.conds")
        return conds.CaptionMask(torch.ones(1, tokens, dtype=torch.bool, device="meta"), all_real).process_cond(batch_size=2)

    def test_is_known_without_looking(self) -> None:
        assert self.mask(5, True).concat([self.mask(5, True), self.mask(5, True)]) is None
        assert self.mask(5, True).concat([]) is None
        assert self.mask(5, True).concat([self.mask(3, True)]).shape == (4, 5)
        assert self.mask(5, True).concat([self.mask(5, False)]).shape == (4, 5)
        assert self.mask(5, False).concat([]).shape == (2, 5)

    @pytest.mark.parametrize(
        ("given", "expected"),
        [(None, [1, 1, 1]), ([[1, 1, 1]], [1, 1, 1]), ([[1, 1, 0]], [1, 1, 0]), ([[1, 1]], [1, 1, 1]), ([[0, 1, 1, 0]], [0, 1, 1])],
    )
    def test_is_decided_from_the_encoders_mask(self, given, expected: list) -> None:
        conds = host.pack_module("nodes.host.conds")
        found = conds.caption_mask(torch.zeros(1, 3, 8), None if given is None else torch.tensor(given))
        assert found.cond.tolist() == [[bool(real) for real in expected]] and found.all_real == all(expected)


def test_batch_of_latents_and_prompts(counted) -> None:
    model, calls = counted
    out = sample(model, captions(6, batch=2), captions(2, seed=1), torch.zeros(4, 4, 8, 8), steps=1)
    assert out.shape == (4, 4, 8, 8) and calls == [(8, 6, True)]


def test_mask_of_the_text_encoder_is_used(sigma) -> None:
    """Padding that the encoder marked must not change the picture."""
    plain, padded = captions(4), captions(4)
    padded[0][0] = torch.cat([padded[0][0], torch.randn(1, 6, host_models.CAPTIONS)], dim=1)
    padded[0][1]["attention_mask"] = torch.tensor([[1] * 4 + [0] * 6])
    expected = sample(sigma, plain, captions(2, seed=1))
    assert difference(sample(sigma, padded, captions(2, seed=1)), expected) < 1e-5
    del padded[0][1]["attention_mask"]
    assert difference(sample(sigma, padded, captions(2, seed=1)), expected) > 1e-3


@pytest.mark.parametrize("size", [(7, 9), (8, 8), (5, 32), (33, 17)])
def test_any_latent_size(sigma, size: tuple[int, int]) -> None:
    out = sample(sigma, captions(4), captions(1, seed=1), torch.zeros(1, 4, *size), steps=2)
    assert out.shape == (1, 4, *size) and torch.isfinite(out).all()


def test_image_to_image_keeps_what_little_denoise_leaves(sigma) -> None:
    start = noise(seed=3)
    little = sample(sigma, captions(4), captions(1, seed=1), start, steps=10, denoise=0.1)
    much = sample(sigma, captions(4), captions(1, seed=1), start, steps=10, denoise=0.9)
    assert (little - start).abs().mean() < (much - start).abs().mean()


def test_inpainting_leaves_the_unmasked_part(sigma) -> None:
    start, mask = noise(seed=3), torch.zeros(1, 1, 64, 64)
    mask[..., :32] = 1.0
    out = sample(sigma, captions(4), captions(1, seed=1), start, steps=4, mask=mask)
    torch.testing.assert_close(out[..., 4:], start[..., 4:], rtol=1e-3, atol=1e-3)
    assert (out[..., :4] - start[..., :4]).abs().mean() > 0.1


def test_regions_by_area_and_mask(sigma) -> None:
    left, right = captions(4)[0], captions(7, seed=5)[0]
    everywhere = sample(sigma, [*captions(4), *captions(7, seed=5)], captions(1, seed=1), steps=2)
    left[1]["area"] = (8, 4, 0, 0)
    right[1]["mask"] = torch.ones(1, 64, 64)
    out = sample(sigma, [left, right], captions(1, seed=1), steps=2)
    assert torch.isfinite(out).all() and difference(out, everywhere) > 1e-3


ASKS_THE_DRIVER = pytest.mark.skipif(host.on_pretended_card(), reason="uni_pc makes one tensor of several on the card")


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "sa_solver", "lcm", pytest.param("uni_pc", marks=ASKS_THE_DRIVER), "ddim"])
def test_samplers(sigma, sampler: str) -> None:
    assert torch.isfinite(sample(sigma, captions(4), captions(1, seed=1), steps=4, sampler=sampler)).all()


def test_lcm_sampling_is_taken_over(sigma) -> None:
    patched = nodes_model_advanced.ModelSamplingDiscrete().patch(sigma, "lcm", False)[0]
    plain = sample(sigma, captions(4), captions(1, seed=1), sampler="lcm", cfg=1.0)
    assert (sample(patched, captions(4), captions(1, seed=1), sampler="lcm", cfg=1.0) - plain).abs().max() > 1e-3
    torch.testing.assert_close(sample(sigma, captions(4), captions(1, seed=1), sampler="lcm", cfg=1.0), plain)


def test_noise_schedule_is_pixarts(sigma) -> None:
    """Linear betas 1e-4 .. 0.02 over 1000 steps."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alphas = torch.cumprod(1 - betas, 0)
    expected = ((1 - alphas) / alphas).sqrt()
    sampling = sigma.get_model_object("model_sampling")
    torch.testing.assert_close(sampling.sigmas.double(), expected, rtol=1e-4, atol=1e-6)
    assert float(sampling.sigma_max) == pytest.approx(157.4, abs=0.05)


def test_conditioning_for_a_controlnet_does_not_disturb(sigma) -> None:
    """`cross_attn_controlnet`, which some ControlNets read instead of the prompt."""
    positive = captions(4)
    positive[0][1]["cross_attn_controlnet"] = torch.randn(1, 4, 16)
    expected = sample(sigma, captions(4), captions(1, seed=1))
    assert difference(sample(sigma, positive, captions(1, seed=1)), expected) < 1e-5


@pytest.mark.parametrize("node", ["LazyCache", "RescaleCFG"])
def test_guidance_and_cache_nodes_of_the_host(sigma, node: str) -> None:
    if node == "LazyCache":
        arguments = {"reuse_threshold": 3.0, "start_percent": 0.0, "end_percent": 1.0, "verbose": False}
        patched = nodes_easycache.LazyCacheNode.execute(sigma, **arguments).result[0]
    else:
        patched = nodes_model_advanced.RescaleCFG().patch(sigma, 0.7)[0]
    plain = sample(sigma, captions(4), captions(1, seed=1), steps=6)
    assert difference(sample(patched, captions(4), captions(1, seed=1), steps=6), plain) > 1e-4
    assert torch.equal(sample(sigma, captions(4), captions(1, seed=1), steps=6), plain)


def test_easycache_skips_steps(counted) -> None:
    model, calls = counted
    execute = nodes_easycache.EasyCacheNode.execute
    eager = execute(model, reuse_threshold=3.0, start_percent=0.0, end_percent=1.0, verbose=False).result[0]
    sample(eager, captions(4), captions(1, seed=1), steps=10)
    skipping = len(calls)
    calls.clear()
    sample(model, captions(4), captions(1, seed=1), steps=10)
    assert skipping < len(calls) == 10


def test_previews_have_a_colour_table(sigma) -> None:
    """The host's Latent2RGB previewer draws a step's latent."""
    factors = sigma.model.latent_format.latent_rgb_factors
    biases = getattr(sigma.model.latent_format, "latent_rgb_factors_bias", None)
    previewer = latent_preview.Latent2RGBPreviewer(factors, biases)
    assert previewer.decode_latent_to_preview(noise()).size == (8, 8)


def test_captions_of_another_width_are_refused(sigma) -> None:
    with pytest.raises(errors.TextEncoderError, match=r"width 32.*T5") as caught:
        sample(sigma, captions(4, width=768), captions(1, width=768))
    assert "768" in str(caught.value)


def test_conditioning_without_text_is_refused(sigma) -> None:
    with pytest.raises(errors.InputError, match="holds no text"):
        sample(sigma, [[None, {}]], captions(1))


def test_latents_of_another_vae_are_refused(sigma) -> None:
    filled = torch.randn(1, 16, 8, 8)
    with pytest.raises(errors.InputError, match=r"\(2, 16, 8, 8\); expected \(batch, 4"):
        sample(sigma, captions(4), captions(1), filled)


@pytest.mark.parametrize("make", [torch.zeros, torch.randn])
def test_latents_of_a_video_are_refused(sigma, make) -> None:
    with pytest.raises(errors.InputError, match=r"\(1, 4, 1, 8, 8\).*PixArtResolution"):
        sample(sigma, captions(4), captions(1), make(1, 4, 1, 8, 8))


@pytest.mark.parametrize(("file", "latent_format"), [("sigma_file", "SDXL"), ("alpha_1024_file", "SD15")])
def test_latent_format_follows_the_family(file: str, latent_format: str, request) -> None:
    model = host_models.load_model(request.getfixturevalue(file))
    assert isinstance(model.model.latent_format, getattr(comfy.latent_formats, latent_format))


def test_two_models_in_a_row(sigma, alpha_1024_file) -> None:
    first = sample(sigma, captions(4), captions(1))
    sample(host_models.load_model(alpha_1024_file), captions(4), captions(1))
    torch.testing.assert_close(sample(sigma, captions(4), captions(1)), first)


def test_model_is_saved_and_loaded_again(sigma, tmp_path) -> None:
    """As ModelSave writes it: with the host's prefix."""
    import inspect

    import comfy.utils

    save = sigma.model.state_dict_for_saving
    needs_weights = "unet_state_dict" in inspect.signature(save).parameters
    state = save(sigma.model.diffusion_model.state_dict()) if needs_weights else save()
    comfy.utils.save_torch_file({k: v.contiguous() for k, v in state.items()}, str(tmp_path / "saved.safetensors"))
    again = host_models.load_model(tmp_path / "saved.safetensors")
    torch.testing.assert_close(sample(again, captions(4), captions(1)), sample(sigma, captions(4), captions(1)))


def test_host_nodes_are_the_hosts() -> None:
    """The pack's folder of the same name must not shadow the host's module."""
    assert hasattr(host_nodes, "common_ksampler")
