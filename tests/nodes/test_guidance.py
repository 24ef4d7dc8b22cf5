"""Perturbed-attention and skip-layer guidance against diffusers and by definition; the host's guidance nodes; regional prompts."""
from __future__ import annotations

import importlib

import comfy.sample
import comfy.samplers
import pytest
import torch
from torch.nn import Linear

import nodes as host_nodes
from tests.support import checkpoint_factory, host
from tests.support.host_models import captions, difference, load_model, noise, sample, write_model

errors = host.pack_module("pixart.errors")
guidance = host.pack_module("pixart.guidance")
PAG = host.pack_module("nodes.guidance").PixArtPAG
PERTURBED, SKIPPED = guidance.PERTURBED_ATTENTION, guidance.SKIPPED_BLOCKS


def guided(model, kind: str = PERTURBED, blocks: str = "1", scale: float = 3.0, start: float = 0.0, end: float = 1.0):
    return PAG.execute(model, kind, blocks, scale, start, end).result[0]


def run(model, **options) -> torch.Tensor:
    return sample(model, captions(5), captions(2, seed=1), **options)


@pytest.mark.parametrize("cfg", [4.5, 1.0])
@pytest.mark.parametrize("blocks", ["1", "0, 2"])
def test_pictures_equal_diffusers_pag_pipeline(sigma, cfg: float, blocks: str) -> None:
    """PixArtSigmaPAGPipeline with the same weights, noise and Euler steps."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.EulerDiscreteScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    transformer = checkpoint_factory.reference_model(checkpoint_factory.diffusers_config(depth=3))
    layers = [f"blocks.{number.strip()}" for number in blocks.split(",")]
    pipeline = diffusers.PixArtSigmaPAGPipeline(None, None, None, transformer, scheduler, pag_applied_layers=layers)
    pipeline.set_progress_bar_config(disable=True)
    states = torch.zeros(2, 6, 32)
    states[0, :5], states[1, :2] = captions(5)[0][0], captions(2, seed=1)[0][0]
    mask = (torch.arange(6)[None] < torch.tensor([[5], [2]])).long()
    negative = {"negative_prompt_embeds": states[1:], "negative_prompt_attention_mask": mask[1:]} if cfg > 1 else {}
    start, highest = noise(seed=7), 157.407
    expected = pipeline(
        prompt_embeds=states[:1], prompt_attention_mask=mask[:1], negative_prompt=None, **negative, guidance_scale=cfg, pag_scale=2.5,
        num_inference_steps=4, latents=start * (1 + highest**2) ** 0.5 / highest, height=64, width=64, use_resolution_binning=False,
        output_type="latent",
    ).images  # fmt: skip
    found = comfy.sample.sample_custom(
        guided(sigma, blocks=blocks, scale=2.5), start.clone(), cfg, comfy.samplers.sampler_object("euler"), scheduler.sigmas.float(),
        captions(5), captions(2, seed=1), torch.zeros_like(start), disable_pbar=True, seed=0,
    )  # fmt: skip
    found = sigma.model.process_latent_in(found)
    assert difference(found, expected) < 2e-4
    plain = comfy.sample.sample_custom(
        sigma, start.clone(), cfg, comfy.samplers.sampler_object("euler"), scheduler.sigmas.float(), captions(5), captions(2, seed=1),
        torch.zeros_like(start), disable_pbar=True, seed=0,
    )  # fmt: skip
    assert difference(sigma.model.process_latent_in(plain), expected) > 1e-2


def test_skipped_blocks_equal_a_model_without_them(sigma, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step of Euler ends at the guided prediction: cond + scale * (cond - weakened)."""
    network = sigma.model.diffusion_model
    cond = run(sigma, steps=1, cfg=1.0)
    kept = [network.blocks[0], network.blocks[2]]
    with monkeypatch.context() as patch:
        patch.setattr(network, "_run_blocks", lambda embedded, *hooks: (_through(kept, embedded[0]), embedded[1]))
        weakened = run(sigma, steps=1, cfg=1.0)
    assert difference(weakened, cond) > 1e-3
    found = run(guided(sigma, SKIPPED, "1", 2.0), steps=1, cfg=1.0)
    assert difference(found, cond + 2.0 * (cond - weakened)) < 1e-5


def _through(blocks: list, inputs) -> torch.Tensor:
    from dataclasses import replace

    for block in blocks:
        inputs = replace(inputs, hidden=block(inputs))
    return inputs.hidden


@pytest.mark.parametrize("kind", [PERTURBED, SKIPPED])
def test_nothing_stays_behind(sigma, kind: str) -> None:
    plain = run(sigma)
    patched = guided(sigma, kind)
    options = dict(patched.model_options["transformer_options"])
    assert difference(run(patched), plain) > 1e-3
    assert patched.model_options["transformer_options"] == options
    assert torch.equal(run(sigma), plain)
    assert torch.equal(run(guided(sigma, kind, scale=0.0)), plain)


def test_range_of_steps(sigma) -> None:
    """Outside of it nothing changes; the ranges of all steps together are the whole."""
    plain, whole = run(sigma, steps=4), run(guided(sigma), steps=4)
    late = run(guided(sigma, start=0.4), steps=4)
    assert difference(late, plain) > 1e-6 and difference(late, whole) > 1e-4
    assert torch.equal(run(guided(guided(sigma, end=0.4), start=0.4001), steps=4), whole)
    assert torch.equal(run(guided(sigma, start=0.9999), steps=1), run(sigma, steps=1))


def test_together_with_a_replaced_block(sigma) -> None:
    """Another pack's replacement of the same block still runs, in both predictions."""
    replaced, calls = sigma.clone(), []

    def replacement(args, extra):
        calls.append(1)
        return extra["original_block"]({name: args[name] for name in ("img", "txt", "vec")})

    replaced.set_model_patch_replace(replacement, "dit", "double_block", 1)
    assert torch.equal(run(guided(replaced), steps=1), run(guided(sigma), steps=1))
    assert len(calls) == 2  # cond and uncond at once, and the weakened one


def test_compressed_blocks_mix_no_tokens_either(tmp_path) -> None:
    """With identity attention a token's attention is its own value, whatever the compression."""
    core = host.pack_module("pixart.attention")
    layer = core.SelfAttention(72, 1, core.torch_attention, torch.nn, ratio=2)
    hidden = torch.randn(1, 16, 72)
    found = layer(hidden, (4, 4), identity=True)
    torch.testing.assert_close(found, layer.proj(hidden @ layer.qkv.weight[144:].T + layer.qkv.bias[144:]))


@pytest.mark.parametrize(
    ("text", "expected"), [("14", {14}), ("3, 10-12", {3, 10, 11, 12}), ("0,27,", {0, 27}), (" 5 - 6 ", {5, 6})]
)
def test_lists_of_blocks(text: str, expected: set) -> None:
    assert guidance.parse_blocks(text, 28) == expected


@pytest.mark.parametrize(
    ("text", "named"), [("3", "'3'"), ("0, x", "'x'"), ("2-1", "'2-1'"), ("", "empty"), ("-1", "'-1'"), ("0-9", "'0-9'")]
)
def test_blocks_that_the_model_does_not_have_are_refused(sigma, text: str, named: str) -> None:
    with pytest.raises(errors.InputError, match=f"{named}.*from 0 to 2"):
        guided(sigma, blocks=text)


def test_a_range_without_steps_is_refused(sigma) -> None:
    """It would be a silent no-op."""
    with pytest.raises(errors.InputError, match="start_percent is 0.6 and end_percent 0.4"):
        guided(sigma, start=0.6, end=0.4)


def test_blocks_of_the_900m(tmp_path) -> None:
    """Depth 42: the list reaches its last block, and no further."""
    deep = load_model(write_model(tmp_path, depth=42, hidden=72))
    assert difference(run(guided(deep, blocks="14, 30-41"), steps=1), run(deep, steps=1)) > 1e-4
    with pytest.raises(errors.InputError, match="'40-42'.*from 0 to 41"):
        guided(deep, blocks="40-42")


def test_other_models_are_refused(sigma) -> None:
    class Other:
        model = type("M", (), {"diffusion_model": Linear(1, 1)})()

    with pytest.raises(errors.InputError, match="Linear.*PixArtModelLoader"):
        guided(Other())


SLG = {"double_layers": "1", "single_layers": "", "start_percent": 0.0, "end_percent": 1.0}
HOST_NODES = {  # module, class, arguments; each changes the picture
    "CFG-Zero*": ("cfg", "CFGZeroStar", {}),
    "CFGNorm": ("cfg", "CFGNorm", {"strength": 1.0}),
    "APG": ("apg", "APG", {"eta": 0.5, "norm_threshold": 5.0, "momentum": 0.0}),
    "Mahiro": ("mahiro", "Mahiro", {}),
    "TCFG": ("tcfg", "TCFG", {}),
    "FreSca": ("fresca", "FreSca", {"scale_low": 1.0, "scale_high": 1.5, "freq_cutoff": 2}),
    "Epsilon Scaling": ("eps", "EpsilonScaling", {"scaling_factor": 1.02}),
    "SLG": ("slg", "SkipLayerGuidanceDiT", {**SLG, "scale": 3.0, "rescaling_scale": 0.0}),
    "SLG simple": ("slg", "SkipLayerGuidanceDiTSimple", SLG),
}


@pytest.mark.parametrize("name", HOST_NODES)
def test_guidance_nodes_of_the_host_change_the_picture(sigma, name: str) -> None:
    module, node, arguments = HOST_NODES[name]
    patched = getattr(importlib.import_module(f"comfy_extras.nodes_{module}"), node).execute(model=sigma, **arguments).result[0]
    plain = run(sigma)
    assert difference(run(patched), plain) > 1e-4
    assert torch.equal(run(sigma), plain)


def test_the_hosts_own_pag_is_for_unets_as_the_help_says(sigma) -> None:
    node = importlib.import_module("comfy_extras.nodes_pag").PerturbedAttentionGuidance
    assert difference(run(node.execute(model=sigma, scale=3.0).result[0]), run(sigma)) < 1e-5


def test_rescaled_cfg_equals_diffusers_on_the_v_prediction(sigma) -> None:
    """RescaleCFG (arXiv:2305.08891) at every step: v = alpha eps - sigma x0 of both prompts, guided, rescaled, and back to x0."""
    rescale = pytest.importorskip("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion").rescale_noise_cfg
    node = importlib.import_module("comfy_extras.nodes_model_advanced").RescaleCFG
    seen, patched = [], node().patch(sigma, 0.7)[0]
    patched.set_model_sampler_post_cfg_function(lambda args: seen.append(args) or args["denoised"])
    sample(patched, captions(5), captions(2, seed=1), steps=4, cfg=12.0)
    changes = []
    for args in seen:
        x, s, scale = args["input"], args["sigma"].reshape(-1, 1, 1, 1), (1 + args["sigma"].reshape(-1, 1, 1, 1) ** 2) ** 0.5
        cond, uncond = (((x - args[name]) / s - s * args[name]) / scale for name in ("cond_denoised", "uncond_denoised"))
        guided = uncond + 12 * (cond - uncond)
        expected, plain = ((x / scale - s * v) / scale for v in (rescale(guided, cond, guidance_rescale=0.7), guided))
        assert difference(args["denoised"], expected) < 1e-5
        changes.append(difference(plain, expected))
    assert len(changes) == 4 and max(changes) > 1e-2


class TestRegionalPrompts:
    """One Euler step without CFG ends at the prediction, so that regions can be put together by hand."""

    def predict(self, model, positive: list) -> torch.Tensor:
        return sample(model, positive, captions(1), steps=1, cfg=1.0)

    def test_masks_weigh_the_predictions_of_their_prompts(self, sigma) -> None:
        order = torch.Generator().manual_seed(0)
        masks = torch.rand(2, 1, 8, 8, generator=order)
        prompts, strengths = [captions(4), captions(9, seed=3)], (1.0, 0.6)
        single = [self.predict(sigma, prompt) for prompt in prompts]
        set_mask = host_nodes.ConditioningSetMask().append
        regions = [set_mask(prompt, mask, "default", strength)[0] for prompt, mask, strength in zip(prompts, masks, strengths)]
        combined = host_nodes.ConditioningCombine().combine(*regions)[0]
        weights = [mask * strength for mask, strength in zip(masks, strengths)]
        expected = sum(w * p for w, p in zip(weights, single)) / sum(weights)
        assert difference(self.predict(sigma, combined), expected) < 1e-5
        assert difference(single[0], single[1]) > 1e-2

    def test_an_area_is_drawn_from_its_own_crop(self, sigma) -> None:
        seen, patched = [], sigma.clone()

        def record(apply_model, args):
            out = apply_model(args["input"], args["timestep"], **args["c"])
            seen.append((args["input"].cpu(), out.cpu()))
            return out

        patched.set_model_unet_function_wrapper(record)
        area = host_nodes.ConditioningSetArea().append(captions(9, seed=3), 32, 64, 32, 0, 0.8)[0]
        found = patched.model.process_latent_in(self.predict(patched, host_nodes.ConditioningCombine().combine(captions(4), area)[0]))
        (whole, base), (crop, inside) = sorted(seen, key=lambda pair: -pair[0].numel())
        assert torch.equal(crop, whole[..., 4:])
        expected = base.clone()
        expected[..., 4:] = (base[..., 4:] + 0.8 * inside) / 1.8
        assert difference(found, expected) < 1e-5
        assert difference(inside, base[..., 4:]) > 1e-3

    def test_with_perturbed_attention(self, sigma) -> None:
        """Regions hold in the weakened prediction too: where both prompts are the same, they are no regions."""
        mask = torch.zeros(1, 8, 8)
        mask[..., :4] = 1
        set_mask = host_nodes.ConditioningSetMask().append
        halves = [set_mask(captions(4), each, "default", 1.0)[0] for each in (mask, 1 - mask)]
        found = self.predict(guided(sigma), host_nodes.ConditioningCombine().combine(*halves)[0])
        assert difference(found, self.predict(guided(sigma), captions(4))) < 1e-5


def test_alpha_with_size_conditioning(tmp_path) -> None:
    alpha = load_model(write_model(tmp_path, micro=True, null_rows=120))
    assert difference(run(guided(alpha)), run(alpha)) > 1e-3
