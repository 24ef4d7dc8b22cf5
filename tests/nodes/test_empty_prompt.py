"""A caption of one token, which an empty negative prompt is, is spared its cross-attention, and nobody sees it."""
from __future__ import annotations

import pytest
import torch
from comfy.patcher_extension import WrappersMP

from tests.support import host, host_models
from tests.support.host_models import captions, difference, sample


@pytest.fixture
def rows(sigma, monkeypatch):
    """How many the first block's cross-attention looks at, and whether under a mask, call by call."""
    seen = []
    layer = sigma.model.diffusion_model.blocks[0].cross_attn
    original = layer._attend

    def attend(chosen, hidden, k, v, mask, options):
        seen.append((len(hidden[chosen]), mask is not None))
        return original(chosen, hidden, k, v, mask, options)

    monkeypatch.setattr(layer, "_attend", attend)
    return seen


def test_the_picture_stays_and_the_mask_goes(sigma, rows, monkeypatch) -> None:
    spared = sample(sigma, captions(5), captions(1, seed=1))
    assert rows == [(1, False)] * 3
    monkeypatch.setattr(host.pack_module("nodes.host.transformer"), "one_token_in", lambda *_: None)
    assert difference(spared, sample(sigma, captions(5), captions(1, seed=1))) < 1e-5
    assert rows[3:] == [(2, True)] * 3


def test_batches_of_prompts_and_pictures(sigma, rows) -> None:
    together = sample(sigma, captions(6, batch=2), captions(1, seed=1), torch.zeros(4, 4, 8, 8), steps=1)
    assert rows == [(4, False)] and len(together) == 4
    sample(sigma, [*captions(5), *captions(9, seed=2)], captions(1, seed=1), steps=1)
    assert rows[1:] in ([(1, True), (1, True)], [(2, True)])  # by where the host puts the negative prompt


def test_padded_by_the_encoder(sigma, rows) -> None:
    expected = sample(sigma, captions(5), captions(1, seed=1), steps=1)
    empty = captions(1, seed=1)
    empty[0][0] = torch.cat([empty[0][0], torch.randn(1, 9, host_models.CAPTIONS)], dim=1)
    empty[0][1]["attention_mask"] = torch.tensor([[1] + [0] * 9])
    assert difference(sample(sigma, captions(5), empty, steps=1), expected) < 1e-5
    assert rows == [(1, False), (1, True)]


def test_who_replaces_the_text_gets_all_rows(sigma, rows) -> None:
    patched = sigma.clone()
    patched.set_model_patch_replace(
        lambda args, extra: extra["original_block"]({**args, "txt": args["txt"] * 1.0, "attn_mask": None}), "dit", "double_block", 0
    )
    sample(patched, captions(5), captions(1, seed=1), steps=1)
    assert rows == [(2, False)]


def test_who_lengthens_the_text_but_not_the_mask_is_told(sigma) -> None:
    """No row may see more than another."""
    patched = sigma.clone()
    patched.set_model_patch_replace(
        lambda args, extra: extra["original_block"]({**args, "txt": torch.cat([args["txt"], args["txt"][:, :3]], dim=1)}), "dit", "double_block", 0
    )
    with pytest.raises(RuntimeError, match="size"):
        sample(patched, captions(5), captions(1, seed=1), steps=1)


def test_who_replaces_attention_sees_all_rows(sigma, rows) -> None:
    patched = sigma.clone()
    options = patched.model_options["transformer_options"]
    options["optimized_attention_override"] = lambda function, *args, **kwargs: function(*args, **kwargs)
    sample(patched, captions(5), captions(1, seed=1), steps=1)
    assert rows == [(2, True)]


@pytest.mark.parametrize(
    "change",
    [
        lambda given: {key: value.flip(0) for key, value in given.items()},
        lambda given: {key: torch.cat([value, value[:, :3]], dim=1) for key, value in given.items()},
        lambda given: given | {"context_mask": torch.ones_like(given["context_mask"])},
        lambda given: {key: torch.cat([value[1:], value[1:]]) for key, value in given.items()},
    ],
    ids=["other order", "longer", "all shown", "the prompt twice"],
)
@pytest.mark.parametrize("place", ["model", "network"])
def test_who_changes_text_and_mask_gets_what_they_say(sigma, rows, monkeypatch, change, place: str) -> None:
    """Wrappers that know nothing of empty prompts."""

    def wrap_model(apply, given):
        c = given["c"] | change({key: given["c"][key] for key in ("c_crossattn", "context_mask")})
        return apply(given["input"], given["timestep"], **c)

    def wrap_network(executor, x, timesteps, context, mask, *rest):
        given = change({"c_crossattn": context, "context_mask": mask})
        return executor(x, timesteps, given["c_crossattn"], given["context_mask"], *rest)

    patched = sigma.clone()
    if place == "model":
        patched.set_model_unet_function_wrapper(wrap_model)
    else:
        patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", wrap_network)
    found = sample(patched, captions(5), captions(1, seed=1), steps=1)
    assert rows == [(2, True)]
    monkeypatch.setattr(host.pack_module("nodes.host.transformer"), "one_token_in", lambda *_: None)
    assert torch.equal(found, sample(patched, captions(5), captions(1, seed=1), steps=1))


def test_who_cuts_the_batch_gets_all_rows(sigma, rows) -> None:
    """A wrapper of the model that runs row by row, and knows tensors alone."""

    def row_by_row(apply, given):
        parts = []
        for i in range(len(given["input"])):
            c = {key: value[i : i + 1] if isinstance(value, torch.Tensor) else value for key, value in given["c"].items()}
            parts.append(apply(given["input"][i : i + 1], given["timestep"][i : i + 1], **c))
        return torch.cat(parts)

    patched = sigma.clone()
    patched.set_model_unet_function_wrapper(row_by_row)
    expected = sample(sigma, captions(5), captions(1, seed=1), steps=1)
    assert difference(sample(patched, captions(5), captions(1, seed=1), steps=1), expected) < 1e-5
    assert rows == [(1, False), (1, True), (1, True)]


def test_a_slice_of_the_host_forgets_the_rows() -> None:
    """Context windows take some rows of a batch, on any device."""
    conds = host.pack_module("nodes.host.conds")
    mask = conds.caption_mask(torch.zeros(3, 4, 8), torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 1, 1, 0]]))
    assert mask.lengths == (4, 1, 0) and mask.process_cond(batch_size=5).lengths == (4, 1, 0, 4, 1)
    assert getattr(mask.concat([]), conds.ONE_TOKEN) == (1, 2, True)
    window = mask._copy_with(mask.cond[1:]).process_cond(batch_size=2)
    assert window.lengths is None and getattr(window.concat([mask]), conds.ONE_TOKEN) == (3, 4, True)
    assert getattr(window.concat([window]), conds.ONE_TOKEN) is None
