"""PixArt ControlNets through the host's own apply node and samplers."""
from __future__ import annotations

import logging

import comfy.conds
import pytest
import torch
from safetensors.torch import save_file
from torch.utils._pytree import tree_map_only

import nodes as host_nodes
from tests.support import host, host_models
from tests.support.checkpoint_factory import diffusers_config, reference_model
from tests.support.host_models import captions, difference, noise, sample
from tests.support.tiny_control import original_keys, reference_control, reference_forward

errors = host.pack_module("pixart.errors")
loader = host.pack_module("nodes.host.controlnet")


class MeanVae:
    """Stands in for the model's VAE: four channels from the means of 8x8 pixels."""

    def __init__(self) -> None:
        self.sizes = []

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """(B, H, W, 3) -> (B, 4, H/8, W/8)."""
        self.sizes.append(tuple(images.shape[:3]))
        means = torch.nn.functional.avg_pool2d(images.movedim(-1, 1), 8)
        return torch.cat([means, means.mean(1, keepdim=True)], dim=1) * 8 - 4


def expected_hint(image: torch.Tensor) -> torch.Tensor:
    """The hint's model latent: encoded, times Sigma's scale."""
    return MeanVae().encode(image) * 0.13025


def picture(height: int = 64, width: int = 64, batch: int = 1, seed: int = 7) -> torch.Tensor:
    """An IMAGE."""
    return torch.rand(batch, height, width, 3, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def control(tmp_path):
    """A CONTROL_NET of two blocks."""
    save_file(original_keys(reference_control(144, 2)), tmp_path / "control.safetensors")
    return loader.load_control(str(tmp_path / "control.safetensors"))


def applied(control, strength=1.0, start=0.0, end=1.0, image=None, positive=None, negative=None, vae=None):
    """(positive, negative) through the host's node."""
    image = picture() if image is None else image
    return host_nodes.ControlNetApplyAdvanced().apply_controlnet(
        positive or captions(5), negative or captions(3, seed=1), control, image, strength, start, end, vae=vae or MeanVae()
    )


def steps_of(model, monkeypatch):
    """A list that collects what each forward was given."""
    seen = []
    network = model.model.diffusion_model
    original = network._denoise

    def look(x, timesteps, context, context_mask, size, positions, control, *others):
        seen.append(tree_map_only(torch.Tensor, lambda tensor: tensor.cpu().clone(), (x, timesteps, context, context_mask, control)))
        return original(x, timesteps, context, context_mask, size, positions, control, *others)

    monkeypatch.setattr(network, "_denoise", look)
    return seen


def test_residuals_equal_the_reference(sigma, control, monkeypatch) -> None:
    """Every residual that reaches the model, beside diffusers' blocks on the same noisy latent."""
    seen = steps_of(sigma, monkeypatch)
    sample(sigma, *applied(control, strength=0.7), steps=2)
    base, adapter = reference_model(diffusers_config(depth=3)), reference_control(144, 2)
    for x, timesteps, context, mask, given in seen:
        hint = expected_hint(picture()).expand(len(x), -1, -1, -1)
        mask = torch.ones(context.shape[:2]) if mask is None else mask
        _, expected = reference_forward(base, [(adapter, hint, 1.0)], x, timesteps, context, mask)
        assert len(given["input"]) == 2
        for ours, theirs in zip(given["input"], expected[0], strict=True):
            torch.testing.assert_close(ours, 0.7 * theirs, rtol=2e-3, atol=2e-3)


def test_control_changes_the_picture_and_is_gone_without_it(sigma, control) -> None:
    plain = sample(sigma, captions(5), captions(3, seed=1))
    assert difference(sample(sigma, *applied(control)), plain) > 1e-2
    assert torch.equal(sample(sigma, captions(5), captions(3, seed=1)), plain)
    assert torch.equal(sample(sigma, *applied(control, strength=0.0)), plain)


def test_a_file_in_fp8_is_what_its_rounded_numbers_say(sigma, tmp_path) -> None:
    """Matrices in e4m3 with the rest in 16 bits, as this pack's trainer writes them, and a file wholly in e4m3."""
    native = {key: value.half() for key, value in original_keys(reference_control(144, 2)).items()}
    files = {"mixed": lambda key: key.endswith("proj.weight") or ".mlp." in key and key.endswith("weight"), "whole": lambda key: True}
    for name, narrow in files.items():
        fp8 = {key: value.to(torch.float8_e4m3fn) if narrow(key) else value for key, value in native.items()}
        save_file(fp8, tmp_path / f"{name}.safetensors")
        save_file({key: value.float() for key, value in fp8.items()}, tmp_path / f"{name}-rounded.safetensors")
        found, expected = (sample(sigma, *applied(loader.load_control(str(tmp_path / f"{name}{end}.safetensors")))) for end in ("", "-rounded"))
        assert difference(found, expected) < 2e-3, name


def test_with_kv_compression_of_the_model(sigma, control, monkeypatch) -> None:
    """The ControlNet branches off an uncompressed first block, and its residuals enter the compressed model."""
    seen = steps_of(sigma, monkeypatch)
    conditioning = applied(control)
    kv = host.pack_module("pixart.kv_compress").KVCompression(2)
    compressed = host.pack_module("nodes.host.kv_compress").compress_model(sigma, kv)
    pictures = [sample(model, *conditioning, steps=1) for model in (sigma, compressed)]
    assert difference(*pictures) > 1e-3 and difference(pictures[1], sample(compressed, captions(5), captions(3, seed=1), steps=1)) > 1e-3
    plain, patched = (given["input"] for *_, given in seen[:2])
    assert all(torch.equal(*pair) for pair in zip(plain, patched, strict=True))


def test_start_and_end_choose_the_steps(sigma, control, monkeypatch) -> None:
    seen = steps_of(sigma, monkeypatch)
    sample(sigma, *applied(control, start=0.3, end=0.6), steps=6)
    with_control = [given is not None for *_, given in seen]
    assert with_control[0] is with_control[-1] is False and any(with_control)


def test_two_controlnets_add_up(sigma, control, monkeypatch) -> None:
    """Both read the model's own first block; their residuals are summed."""
    seen = steps_of(sigma, monkeypatch)
    one = applied(control, 1.0)
    two = applied(control, 0.5, image=picture(seed=9), positive=one[0], negative=one[1])
    sample(sigma, *two, steps=1)
    x, timesteps, context, mask, given = seen[0]
    base, adapter = reference_model(diffusers_config(depth=3)), reference_control(144, 2)
    hints = [expected_hint(picture(seed=seed)).expand(len(x), -1, -1, -1) for seed in (7, 9)]
    mask = torch.ones(context.shape[:2]) if mask is None else mask
    _, expected = reference_forward(base, [(adapter, hints[0], 1.0), (adapter, hints[1], 0.5)], x, timesteps, context, mask)
    for ours, first, second in zip(given["input"], *expected, strict=True):
        torch.testing.assert_close(ours, first + 0.5 * second, rtol=2e-3, atol=2e-3)


def test_a_hint_per_picture_of_the_batch(sigma, control, monkeypatch) -> None:
    seen = steps_of(sigma, monkeypatch)
    sample(sigma, *applied(control, image=picture(batch=2)), torch.zeros(2, 4, 8, 8), steps=1)
    given = seen[0][4]["input"][0]
    assert given.shape == (4, 16, 144)  # two pictures, each with prompt and negative
    assert not torch.allclose(given[0], given[1])


def test_the_hint_is_encoded_once_and_fitted_to_the_picture(sigma, control, caplog) -> None:
    vae = MeanVae()
    with caplog.at_level(logging.WARNING):
        sample(sigma, *applied(control, image=picture(100, 300), vae=vae), torch.zeros(1, 4, 9, 16), steps=3)
    assert vae.sizes == [(1, 72, 128)]
    assert any("300x100" in message and "128x72" in message for message in caplog.messages)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        sample(sigma, *applied(control, image=picture(144, 256), vae=vae), torch.zeros(1, 4, 9, 16), steps=1)
    assert not any("hint" in message for message in caplog.messages)


def test_hints_with_transparency_or_in_one_channel(sigma, control, monkeypatch) -> None:
    """An alpha channel is left out, grey stands for all three colours."""
    seen, grey = steps_of(sigma, monkeypatch), picture()[..., :1]
    for image in (picture(), torch.cat([picture(), torch.rand(1, 64, 64, 1)], -1), grey, grey.repeat(1, 1, 1, 3)):
        sample(sigma, *applied(control, image=image), steps=1)
    color, transparent, one, three = (given[4]["input"][0] for given in seen)
    assert torch.equal(color, transparent) and torch.equal(one, three) and not torch.equal(color, one)


def test_together_with_pag_and_regional_prompts(sigma, control, monkeypatch) -> None:
    """One Euler step without CFG ends at the prediction: that of the controlled regions, away from its own perturbed one."""
    pag, transformer = host.pack_module("nodes.guidance").PixArtPAG, host.pack_module("nodes.host.transformer")
    mask = torch.zeros(1, 8, 8)
    mask[..., :3] = 1
    set_mask = host_nodes.ConditioningSetMask().append
    regions = [*set_mask(captions(5), mask, "default", 1.0)[0], *set_mask(captions(9, seed=4), 1 - mask, "default", 1.0)[0]]

    def draw(model, positive) -> torch.Tensor:
        return sample(model, positive, captions(1), steps=1, cfg=1.0)

    controlled, _ = applied(control, positive=regions, negative=captions(1))
    with monkeypatch.context() as patch:
        extra_conds = type(sigma.model).extra_conds
        told = {transformer.IDENTITY_BLOCKS: comfy.conds.CONDConstant((0, 2))}
        patch.setattr(type(sigma.model), "extra_conds", lambda self, **given: {**extra_conds(self, **given), **told})
        weakened = draw(sigma, controlled)
    expected = draw(sigma, controlled) + 2.0 * (draw(sigma, controlled) - weakened)
    found = draw(pag.execute(sigma, "perturbed attention", "0, 2", 2.0, 0.0, 1.0).result[0], controlled)
    assert difference(found, expected) < 1e-4
    assert min(difference(found, draw(sigma, controlled)), difference(draw(sigma, controlled), draw(sigma, regions))) > 1e-3
    assert difference(draw(sigma, regions), draw(sigma, captions(5))) > 1e-3


@pytest.mark.parametrize("size", [(7, 9), (8, 12)])
def test_any_latent_size(sigma, control, size) -> None:
    out = sample(sigma, *applied(control), torch.zeros(1, 4, *size), steps=1)
    assert out.shape == (1, 4, *size) and torch.isfinite(out).all()


def test_image_to_image_masks_and_areas(sigma, control) -> None:
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., :32] = 1
    start = noise(seed=3)
    out = sample(sigma, *applied(control), start, steps=3, denoise=0.6, mask=mask)
    torch.testing.assert_close(out[..., 4:], start[..., 4:], rtol=1e-3, atol=1e-3)
    positive, negative = applied(control)
    positive[0][1]["mask"] = torch.ones(1, 64, 64)
    area = captions(4, seed=8)[0]
    area[1]["area"] = (4, 8, 0, 0)
    assert torch.isfinite(sample(sigma, [*positive, area], negative, steps=1)).all()


def test_alpha_uses_its_own_scale_and_size(alpha_1024_file, tmp_path, monkeypatch) -> None:
    save_file(original_keys(reference_control(144, 1)), tmp_path / "alpha.safetensors")
    model = host_models.load_model(alpha_1024_file)
    seen = steps_of(model, monkeypatch)
    sample(model, *applied(loader.load_control(str(tmp_path / "alpha.safetensors"))), steps=1)
    x, timesteps, context, mask, given = seen[0]
    hint = (MeanVae().encode(picture()) * 0.18215).expand(len(x), -1, -1, -1)
    pixels = torch.full((len(x), 2), 64.0)
    mask = torch.ones(context.shape[:2]) if mask is None else mask
    _, expected = reference_forward(
        reference_model(diffusers_config(micro=True)), [(reference_control(144, 1), hint, 1.0)], x, timesteps, context, mask,
        {"resolution": pixels, "aspect_ratio": torch.ones(len(x), 1)},
    )  # fmt: skip
    torch.testing.assert_close(given["input"][0], expected[0][0], rtol=2e-3, atol=2e-3)


def test_lora_on_the_model_reaches_the_controlnets_first_block(sigma, control, monkeypatch) -> None:
    """What the ControlNet reads is the patched model's."""
    patched = sigma.clone()
    patched.add_patches({"diffusion_model.blocks.0.mlp.fc2.weight": (torch.randn(144, 576),)}, 1.0)
    seen = steps_of(sigma, monkeypatch)
    sample(sigma, *applied(control), steps=1)
    sample(patched, *applied(control), steps=1)
    assert difference(seen[1][4]["input"][0], seen[0][4]["input"][0]) > 1e-2


def test_text_of_its_own(sigma, control) -> None:
    """CLIPTextEncodeControlnet: another prompt for the ControlNet, of the same T5."""
    positive, negative = applied(control)
    plain = sample(sigma, positive, negative)
    positive[0][1]["cross_attn_controlnet"] = torch.randn(1, 4, host_models.CAPTIONS)
    assert difference(sample(sigma, positive, negative), plain) > 1e-3
    positive[0][1]["cross_attn_controlnet"] = torch.randn(1, 4, 16)
    with pytest.raises(errors.InputError, match="16 wide.*width 32"):
        sample(sigma, positive, negative)


class TestBadInput:
    def test_without_a_vae(self, sigma, control) -> None:
        positive, negative = host_nodes.ControlNetApplyAdvanced().apply_controlnet(
            captions(4), captions(1), control, picture(), 1.0, 0.0, 1.0
        )
        with pytest.raises(errors.InputError, match="connect the model's VAE"):
            sample(sigma, positive, negative, steps=1)

    def test_of_another_width(self, sigma, tmp_path) -> None:
        save_file(original_keys(reference_control(72, 2)), tmp_path / "narrow.safetensors")
        with pytest.raises(errors.InputError, match="72 wide, the model 144"):
            sample(sigma, *applied(loader.load_control(str(tmp_path / "narrow.safetensors"))), steps=1)

    def test_with_too_many_blocks(self, sigma, tmp_path) -> None:
        save_file(original_keys(reference_control(144, 3)), tmp_path / "deep.safetensors")
        with pytest.raises(errors.InputError, match="3 blocks.*depth 3 takes at most 2"):
            sample(sigma, *applied(loader.load_control(str(tmp_path / "deep.safetensors"))), steps=1)

    def test_with_a_vae_of_another_family(self, sigma, control) -> None:
        class Deep(MeanVae):
            def encode(self, images):
                return super().encode(images).repeat(1, 4, 1, 1)

        with pytest.raises(errors.InputError, match=r"\(16, 8, 8\).*expected \(4, 8, 8\)"):
            sample(sigma, *applied(control, vae=Deep()), steps=1)


def test_nothing_of_a_run_is_kept(sigma, control) -> None:
    positive, negative = applied(control)
    sample(sigma, positive, negative, steps=1)
    used = positive[0][1]["control"]
    assert used._running is None and used._hints == {} and used.model_sampling_current is None
    assert not [name for name, value in vars(control.control_model).items() if isinstance(value, torch.Tensor)]


def test_a_run_that_failed_leaves_no_hint_to_the_next(sigma, control, monkeypatch) -> None:
    """The host cleans up after a success only; the next model may have another latent scale."""
    vae = MeanVae()
    positive, negative = applied(control, vae=vae)

    def fail(*_: object) -> None:
        raise RuntimeError("stopped")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="stopped"):
        patch.setattr(type(control.control_model), "forward", fail)
        sample(sigma, positive, negative, steps=1)
    sample(sigma, positive, negative, steps=1)
    assert len(vae.sizes) == 2 * len({id(positive[0][1]["control"]), id(negative[0][1]["control"])})


def test_the_node_resolves_names_inside_the_hosts_folder(models, tmp_path) -> None:
    node = host.pack_module("nodes.controlnet").PixArtControlNetLoader
    save_file(original_keys(reference_control(72, 1)), models / "controlnet" / "tiny.safetensors")
    assert node.execute("tiny.safetensors").result[0].control_model.config.depth == 1
    with pytest.raises(errors.CheckpointError, match="not in the folder controlnet"):
        node.execute("../loras/tiny.safetensors")
