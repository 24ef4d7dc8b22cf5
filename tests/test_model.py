"""The transformer's own promises; equality with diffusers at full width is in tests/fidelity."""
import dataclasses

import pytest
import torch

from pixart.attention import OneToken, one_token_of, torch_attention
from pixart.config import TransformerConfig
from pixart.errors import ConfigError, InputError
from pixart.model import PixArtTransformer

TINY = TransformerConfig(hidden_size=144, depth=3, num_heads=2, mlp_hidden=288, caption_channels=24, max_tokens=20)


def tiny(config=TINY, seed=0, **arguments):
    model = PixArtTransformer(config, **arguments).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def inputs(batch=2, height=8, width=12, tokens=7, seed=1, channels=24):
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(batch, 4, height, width, generator=generator)
    context = torch.randn(batch, tokens, channels, generator=generator)
    return latent, torch.linspace(10.0, 900.0, batch), context


@pytest.fixture(scope="module")
def model():
    return tiny()


def test_output_has_noise_and_variance(model):
    assert model(*inputs()).shape == (2, 8, 8, 12)


@pytest.mark.parametrize("height, width", [(7, 12), (8, 11), (5, 5), (1, 1), (2, 64)])
def test_any_latent_size(model, height, width):
    assert model(*inputs(height=height, width=width)).shape == (2, 8, height, width)


def test_odd_latent_is_the_padded_one_cropped(model):
    latent, timestep, context = inputs(height=7, width=11)
    padded = torch.nn.functional.pad(latent, (0, 1, 0, 1), mode="replicate")
    torch.testing.assert_close(model(latent, timestep, context), model(padded, timestep, context)[..., :7, :11])


def test_masked_padding_changes_nothing(model):
    latent, timestep, context = inputs()
    mask = torch.tensor([[1] * 7 + [0] * 3, [1] * 4 + [0] * 6])
    padded = torch.cat([context, torch.full((2, 3, 24), 50.0)], dim=1)
    together = model(latent, timestep, padded, mask)
    alone = [model(latent[i : i + 1], timestep[i : i + 1], context[i : i + 1, :n]) for i, n in ((0, 7), (1, 4))]
    torch.testing.assert_close(together, torch.cat(alone))


def test_a_known_empty_prompt_changes_nothing_but_the_work():
    model = tiny()
    latent, timestep, context = inputs(batch=3)
    mask = torch.tensor([[1] * 7, [1] + [0] * 6, [1] * 4 + [0] * 3])
    expected, seen = model(latent, timestep, context, mask), []
    for block in model.blocks:
        block.cross_attn.q_linear.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape)))
    torch.testing.assert_close(model(latent, timestep, context, mask, one_token=one_token_of((7, 1, 4), 7)), expected)
    assert seen == [(1, 24, 144), (1, 24, 144)] * 3  # the first row and the last; nothing of the second
    with pytest.raises(InputError, match="one_token names captions 2 to 3; expected some of 0 to 2"):
        model(latent, timestep, context, mask, one_token=OneToken(2, 4, False))


def test_batch_entries_do_not_meet(model):
    latent, timestep, context = inputs(batch=3)
    together = model(latent, timestep, context)
    for i in range(3):
        part = slice(i, i + 1)
        torch.testing.assert_close(together[part], model(latent[part], timestep[part], context[part]))


def test_attention_is_a_seam():
    calls = []

    def attention(q, k, v, *, heads, mask=None, options=None):
        calls.append((q.shape[1], k.shape[1], heads, options))
        return torch_attention(q, k, v, heads=heads, mask=mask)

    model = tiny(attention=attention)
    torch.testing.assert_close(model(*inputs(), attention_options="mine"), tiny()(*inputs()))
    assert calls == [(24, 24, 2, "mine"), (24, 7, 2, "mine")] * 3


def test_block_wrapper_replaces_and_is_gone_after(model):
    before = model(*inputs())
    seen = []

    def skip(given, block):
        seen.append((given.grid, given.hidden.shape, given.modulation.shape))
        return given.hidden

    skipped = model(*inputs(), block_wrappers={1: skip})
    assert seen == [((4, 6), (2, 24, 144), (2, 6, 144))]
    assert not torch.allclose(skipped, before)

    def changed_context(given, block):
        return block(dataclasses.replace(given, context=given.context * 0))

    assert not torch.allclose(model(*inputs(), block_wrappers={0: changed_context}), before)
    assert torch.equal(model(*inputs()), before)


def test_block_residual_is_added_to_that_blocks_output(model):
    residual = torch.randn(2, 24, 144)
    by_argument = model(*inputs(), block_residuals={1: residual})
    by_wrapper = model(*inputs(), block_wrappers={1: lambda given, block: block(given) + residual})
    torch.testing.assert_close(by_argument, by_wrapper)
    assert not torch.allclose(by_argument, model(*inputs()))


def test_forward_leaves_nothing_on_the_module(model):
    def held():
        return {(name, key) for name, module in model.named_modules() for key in vars(module)}

    before = held()
    model(*inputs())
    assert held() == before


def test_micro_condition_defaults_to_the_latents_size():
    config = dataclasses.replace(TINY, micro_condition=True)
    model = tiny(config)
    default = model(*inputs())
    stated = model(*inputs(), size=torch.tensor([[64.0, 96.0]] * 2))
    other = model(*inputs(), size=torch.tensor([[64.0, 64.0]] * 2))
    assert torch.equal(default, stated)
    assert not torch.allclose(default, other)


@pytest.mark.parametrize("dtype, limit", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_half_precision_is_near(dtype, limit):
    exact = tiny()(*inputs())
    latent, timestep, context = inputs()
    rough = tiny().to(dtype)(latent.to(dtype), timestep, context.to(dtype))
    assert rough.dtype == dtype
    assert (rough.float() - exact).norm() / exact.norm() < limit


def bad_calls():
    latent, timestep, context = inputs()
    yield "latent", (latent[:, :3], timestep, context), {}
    yield "latent", (latent[:, :, :0], timestep, context), {}
    yield "timestep", (latent, timestep[:1], context), {}
    yield "context", (latent, timestep, context[..., :8]), {}
    yield "context", (latent, timestep, context[:1]), {}
    yield "context_mask", (latent, timestep, context, torch.ones(2, 3)), {}
    yield "size", (latent, timestep, context), {"size": torch.ones(2, 2)}
    yield "block_wrappers", (latent, timestep, context), {"block_wrappers": {3: None}}
    yield "block_residuals", (latent, timestep, context), {"block_residuals": {-1: None}}


@pytest.mark.parametrize("name, given, named", list(bad_calls()))
def test_wrong_shapes_are_named(model, name, given, named):
    with pytest.raises(InputError, match=f"^{name} .*(expected|leave it out|has blocks)"):
        model(*given, **named)


def test_sizes_that_can_not_be():
    with pytest.raises(ConfigError, match="not a multiple of num_heads"):
        TransformerConfig(hidden_size=1152, num_heads=7)
