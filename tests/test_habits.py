"""What users of diffusers write, given to pixart.Pipeline."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import pixart
from pixart.errors import InputError
from tests.support.tiny_pipeline import make_parts


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    folder = make_parts(tmp_path_factory.mktemp("pipeline")).folder
    return pixart.Pipeline.from_files(folder, folder, folder)


def draw(pipe, **given):
    return pipe(
        **{
            "prompt": "a red circle",
            "steps": 1,
            "width": 64,
            "height": 64,
            "use_bins": False,
            "seed": 0,
            "progress": False,
            "output": "latent",
            **given,
        }
    )


def test_none_is_no_negative_prompt(pipe) -> None:
    assert torch.equal(draw(pipe, negative_prompt=None), draw(pipe, negative_prompt=""))


def test_numpy_and_torch_numbers(pipe) -> None:
    expected = draw(pipe, steps=2, guidance=3.0, width=64, images_per_prompt=2)
    found = draw(pipe, steps=np.int64(2), guidance=np.float32(3.0), width=np.int32(64), images_per_prompt=torch.tensor(2))
    assert torch.equal(found, expected)


def test_tensors_as_embeddings_with_their_mask(pipe) -> None:
    made = pipe.encode(["a red circle", "blue"])
    expected = draw(pipe, prompt=["a red circle", "blue"])
    given = {"prompt": None, "prompt_embeds": made.states, "prompt_attention_mask": made.mask.long()}
    assert torch.equal(draw(pipe, **given), expected)
    empty = pipe.encode("")
    given |= {"negative_prompt_embeds": empty.states, "negative_prompt_attention_mask": empty.mask.float()}
    assert torch.equal(draw(pipe, **given), expected)
    one = pipe.encode("a red circle").states
    assert torch.equal(draw(pipe, prompt=None, prompt_embeds=one), draw(pipe))  # without a mask every token is real


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": None, "prompt_embeds": torch.zeros(4, 32)}, r"prompt_embeds is Tensor of shape \(4, 32\)"),
        ({"prompt": None, "prompt_embeds": np.zeros((1, 4, 32))}, "prompt_embeds is ndarray of shape"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 4, 32), "prompt_attention_mask": torch.ones(1, 3)}, r"mask \(1, 3\)"),
        ({"prompt_attention_mask": torch.ones(1, 3)}, "A mask was given, but prompt_embeds is NoneType"),
        ({"num_inference_steps": 20}, "num_inference_steps is not an argument here; use steps"),
        ({"guidance_scale": 4.5, "generator": None}, "use guidance. generator is not an argument here; use seed"),
        ({"output_type": "pil"}, "use output"),
        ({"stepps": 3}, "stepps is not an argument here; use steps"),
        ({"zzz": 3}, r"zzz is not an argument here. See help"),
        ({"steps": np.array([1, 2])}, "steps is array"),
    ],
)  # fmt: skip
def test_what_is_meant_is_said(pipe, given: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        draw(pipe, **given)
