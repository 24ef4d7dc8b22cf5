"""ControlNets beside diffusers' own blocks, residual by residual, in fp32."""
import dataclasses

import pytest
import torch

from pixart.checkpoints.controlnet import prepare_controlnet
from pixart.config import TransformerConfig
from pixart.controlnet import ControlledTransformer, ControlNetConfig, PixArtControlNet, copy_base_blocks
from pixart.errors import InputError
from pixart.model import PixArtTransformer
from tests.support.checkpoint_factory import diffusers_config, original_keys, reference_model
from tests.support.tiny_control import original_keys as control_keys
from tests.support.tiny_control import reference_control, reference_forward

DEPTH = 4


def make_base(micro=False):
    """diffusers' model, and ours with the same weights."""
    reference = reference_model(diffusers_config(depth=DEPTH, micro=micro))
    config = TransformerConfig(
        hidden_size=144, depth=DEPTH, num_heads=2, mlp_hidden=576, caption_channels=32, micro_condition=micro, null_caption=False
    )
    model = PixArtTransformer(config, device="meta")
    model.load_state_dict(original_keys(reference.state_dict(), DEPTH), strict=True, assign=True)
    return reference, model.eval().requires_grad_(False)


def make_control(depth=2, seed=5):
    """The reference's adapter, and ours with the same weights."""
    adapter = reference_control(depth=depth, seed=seed)
    prepared = prepare_controlnet(control_keys(adapter), "test")
    model = PixArtControlNet(prepared.config, device="meta")
    model.load_state_dict(prepared.state_dict, strict=True, assign=True)
    return adapter, model.eval()


def inputs(height=8, width=12, seed=3):
    generator = torch.Generator().manual_seed(seed)
    latent, hint = torch.randn(2, 2, 4, height, width, generator=generator)
    context = torch.randn(2, 7, 32, generator=generator)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    return latent, hint, torch.tensor([999, 400]), context, mask


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("micro", [False, True])
def test_output_equals_the_reference(depth, micro):
    reference, base = make_base(micro)
    adapter, control = make_control(depth)
    latent, hint, timestep, context, mask = inputs()
    pixels = torch.tensor([[64.0, 96.0]] * 2)
    added = {"resolution": pixels, "aspect_ratio": pixels[:, :1] / pixels[:, 1:]} if micro else None
    expected, _ = reference_forward(reference, [(adapter, hint, 0.8)], latent, timestep, context, mask, added)
    found = ControlledTransformer(base, control)(latent, timestep.float(), context, mask, hint=hint, strength=0.8)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    without = base(latent, timestep.float(), context, mask)
    assert (found - without).norm() / without.norm() > 0.05


def test_every_residual_equals_the_reference():
    reference, base = make_base()
    adapter, control = make_control(3)
    latent, hint, timestep, context, mask = inputs()
    _, expected = reference_forward(reference, [(adapter, hint, 1.0)], latent, timestep, context, mask)
    given, _ = base.embed(latent, timestep.float(), context, mask)
    given = dataclasses.replace(given, hidden=base.blocks[0](given))
    found = control(given, base.embed_latent(hint))
    assert len(found) == 3
    for ours, theirs in zip(found, expected[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_residuals_given_to_the_base_are_the_same_as_one_forward():
    """Hosts compute residuals apart and hand them to the base's forward."""
    _, base = make_base()
    _, control = make_control()
    latent, hint, timestep, context, mask = inputs()
    given, _ = base.embed(latent, timestep.float(), context, mask)
    given = dataclasses.replace(given, hidden=base.blocks[0](given))
    residuals = dict(enumerate(control(given, base.embed_latent(hint))))
    apart = base(latent, timestep.float(), context, mask, block_residuals=residuals)
    together = ControlledTransformer(base, control)(latent, timestep.float(), context, mask, hint=hint)
    torch.testing.assert_close(apart, together)


def test_a_fresh_copy_changes_nothing():
    _, base = make_base()
    control = PixArtControlNet(ControlNetConfig(144, 2, 2, 576))
    copy_base_blocks(control, base)
    latent, hint, timestep, context, mask = inputs()
    torch.testing.assert_close(
        ControlledTransformer(base, control)(latent, timestep.float(), context, mask, hint=hint),
        base(latent, timestep.float(), context, mask),
    )
    assert torch.equal(control.controlnet[1].copied_block.attn.qkv.weight, base.blocks[1].attn.qkv.weight)


def test_only_the_controlnet_is_trained_and_saved():
    _, base = make_base()
    control = PixArtControlNet(ControlNetConfig(144, 2, 2, 576))
    copy_base_blocks(control, base)
    model = ControlledTransformer(base, control)
    latent, hint, timestep, context, mask = inputs()
    model(latent, timestep.float(), context, mask, hint=hint).sum().backward()
    assert all(parameter.grad is None for parameter in base.parameters())
    assert control.controlnet[0].after_proj.weight.grad.abs().max() > 0
    assert set(model.state_dict()) == {f"controlnet.{key}" for key in control.state_dict()}


def test_odd_latents_are_padded_like_the_bases():
    _, base = make_base()
    _, control = make_control()
    latent, hint, timestep, context, mask = inputs(7, 9)
    model = ControlledTransformer(base, control)
    found = model(latent, timestep.float(), context, mask, hint=hint)
    pad = torch.nn.functional.pad
    padded = model(pad(latent, (0, 1, 0, 1), mode="replicate"), timestep.float(), context, mask,
                   hint=pad(hint, (0, 1, 0, 1), mode="replicate"))  # fmt: skip
    torch.testing.assert_close(found, padded[..., :7, :9])


def test_bf16_is_near():
    _, base = make_base()
    _, control = make_control(3)
    latent, hint, timestep, context, mask = inputs()
    exact = ControlledTransformer(base, control)(latent, timestep.float(), context, mask, hint=hint)
    half = ControlledTransformer(base.bfloat16(), control.bfloat16())
    rough = half(latent.bfloat16(), timestep.float(), context.bfloat16(), mask, hint=hint.bfloat16())
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).norm() / exact.norm() < 2e-2


@pytest.mark.parametrize(
    "change, message",
    [({"hidden_size": 216, "num_heads": 3}, "216 wide, the model 144"), ({"num_heads": 4}, "4 heads, the model 2"),
     ({"depth": 4}, "4 blocks.*depth 4 takes at most 3")],
)  # fmt: skip
def test_a_controlnet_of_another_model_is_refused(change, message):
    _, base = make_base()
    config = dataclasses.replace(ControlNetConfig(144, 2, 2, 576), **change)
    with pytest.raises(InputError, match=message):
        ControlledTransformer(base, PixArtControlNet(config))


def test_a_base_compressed_without_weights_is_refused():
    """Its ControlNet's copies would have to compress too, and no weights say so."""
    _, base = make_base()
    control = PixArtControlNet(ControlNetConfig(144, 2, 2, 576))
    base.config = dataclasses.replace(base.config, compressed_blocks=((1, 2), (3, 2)), compression_mode="uniform")
    with pytest.raises(InputError, match=r"its copies don't compress as the model's block\(s\) \[1\] do, without weights \(uniform\)"):
        control.check_fits(base.config)
    control.check_fits(dataclasses.replace(base.config, compressed_blocks=((2, 2), (3, 2))))
    control.check_fits(dataclasses.replace(base.config, compression_mode="conv"))


def test_a_hint_of_another_size_is_refused():
    _, base = make_base()
    _, control = make_control()
    latent, hint, timestep, context, mask = inputs()
    with pytest.raises(InputError, match=r"hint has shape \(2, 4, 8, 10\)"):
        ControlledTransformer(base, control)(latent, timestep.float(), context, mask, hint=hint[..., :10])
