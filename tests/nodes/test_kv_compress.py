"""KV compression through the host's MODEL: files trained with it, and the PixArtKVCompress patch."""
from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import comfy.ldm.modules.attention as host_attention
import comfy.model_base
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from safetensors.torch import save_file

import nodes as host_nodes
from tests.nodes.test_contract import controlled
from tests.nodes.test_lora import native
from tests.support import checkpoint_factory, host
from tests.support.compiled import compiled
from tests.support.host_models import CAPTIONS, captions, difference, forward, load_model, noise, sample
from tests.support.kv_reference import compressed_model, predict, write_compressed

kv_module = host.pack_module("nodes.host.kv_compress")
errors = host.pack_module("pixart.errors")
core = host.pack_module("pixart.kv_compress")
load = host.pack_module("pixart.checkpoints.load")
node = host.pack_module("nodes.kv_compress").PixArtKVCompress
guide = host.pack_module("nodes.host.guidance").guide_by_perturbation
DEFAULTS = {
    "ratio": 2, "method": "mean", "first_block": 0, "last_block": -1, "start_percent": 0.0, "end_percent": 1.0, "min_tokens": 0,
}  # fmt: skip
SIZES = {"depth": 3, "captions": CAPTIONS, "null_rows": None}
BLOCKS = {0: 3, 2: 2}


def patch(model, **changes):
    """The node's MODEL."""
    return node.execute(model=model, **{**DEFAULTS, **changes}).result[0]


def run(model, steps: int = 3):
    return sample(model, captions(5), captions(2, seed=1), steps=steps)


def keys_seen(model, steps: int = 1) -> list[list[int]]:
    """Keys of each block's self-attention, step by step; there are 16 picture tokens and 5 words."""
    watched, seen = model.clone(), []

    def override(function, q, k, v, *args, **kwargs):
        seen.append(k.shape[1])
        return function(q, k, v, *args, **kwargs)

    watched.model_options["transformer_options"]["optimized_attention_override"] = override
    run(watched, steps)
    own = seen[::2]  # self, cross, self, ...
    return [own[i : i + 3] for i in range(0, len(own), 3)]


class TestTrained:
    @pytest.mark.parametrize("kind", [kind for kind in checkpoint_factory.FORMATS if kind != "pth-ema"])
    @pytest.mark.parametrize("mode", ["conv", "uniform_every"])
    def test_every_format_is_exact(self, kind: str, mode: str, tmp_path: Path) -> None:
        """5 x 7 tokens, beside diffusers' model with attention in loops."""
        path, config = write_compressed(kind, tmp_path, BLOCKS, mode, **SIZES)
        latent, states, mask = noise(10, 14, 2), captions(7, batch=2)[0][0], torch.arange(7)[None] < torch.tensor([[7], [2]])
        expected = predict(compressed_model(config, BLOCKS, mode, (5, 7)), latent, torch.tensor([999, 30]), states, mask)[:, :4]
        model = load_model(path, weight_dtype="fp32")
        assert difference(forward(model, latent, torch.tensor([999.0, 30.0]), states, context_mask=mask), expected) < 1e-5

    def test_sampler_and_keys(self, tmp_path: Path) -> None:
        model = load_model(write_compressed("safetensors", tmp_path, BLOCKS, "conv", **SIZES)[0])
        assert keys_seen(model) == [[1, 16, 4]]
        assert torch.isfinite(run(model)).all()

    def test_a_picture_that_compression_would_empty(self, tmp_path: Path) -> None:
        path, _ = write_compressed("safetensors", tmp_path, {1: 5}, "conv", **SIZES)
        model, calls = load_model(path), []
        model.model.diffusion_model.register_forward_pre_hook(lambda *_: calls.append(1))
        with pytest.raises(errors.InputError, match="PixArtModelLoader's model: block 1 compresses .* by 5.* 4 x 4 .*at least 80 px"):
            run(model)
        assert not calls  # before the first step
        area = host_nodes.ConditioningSetArea().append(captions(5, seed=3), 64, 32, 0, 0, 1.0)[0]
        with pytest.raises(errors.InputError, match="PixArtModelLoader's model: block 1 compresses .* 2 x 4 tokens"):
            sample(load_model(path), captions(5) + area, captions(2, seed=1), torch.zeros(1, 4, 16, 16), steps=1)
        with pytest.raises(errors.InputError, match="PixArtModelLoader's model: block 1 compresses .* 2 x 4 tokens"):
            sample(compiled(load_model(path)), captions(5) + area, captions(2, seed=1), torch.zeros(1, 4, 16, 16), steps=1)

    def test_blocks_are_not_compressed_twice(self, tmp_path: Path) -> None:
        model = load_model(write_compressed("safetensors", tmp_path, BLOCKS, "conv", **SIZES)[0])
        with pytest.raises(errors.InputError, match=r"PixArtKVCompress: block\(s\) 0, 2 of 0-2 .* Expected blocks among 1"):
            patch(model)
        assert keys_seen(patch(model, first_block=1, last_block=1)) == [[1, 4, 4]]


class TestPatch:
    def test_same_as_the_core(self, sigma, sigma_file: Path) -> None:
        compression = (core.KVCompression(2, last_block=0), core.KVCompression(4, "stride", first_block=2))
        latent, step, states = noise(10, 14, 2), torch.tensor([999.0, 30.0]), captions(7, batch=2)[0][0]
        found = forward(sigma, latent, step, states, kv_compression=compression)
        expected = load.load_transformer(sigma_file)(latent, step, states, kv_compression=compression)[:, :4]
        assert difference(found, expected) < 1e-5
        assert difference(found, forward(sigma, latent, step, states)) > 1e-3

    def test_changes_the_picture_and_leaves_its_input_alone(self, sigma) -> None:
        """As when the node is bypassed again."""
        plain = run(sigma)
        patched = patch(sigma)
        assert difference(run(patched), plain) > 1e-4
        assert torch.equal(run(sigma), plain)
        assert torch.equal(run(patched), run(patched.clone()))

    def test_inputs_reach_the_attention(self, sigma) -> None:
        assert keys_seen(sigma) == [[16, 16, 16]]
        assert keys_seen(patch(sigma)) == [[4, 4, 4]]
        assert keys_seen(patch(sigma, ratio=3, method="stride", first_block=1, last_block=1)) == [[16, 4, 16]]
        assert keys_seen(patch(sigma, min_tokens=17)) == [[16, 16, 16]]

    def test_part_of_sampling(self, sigma) -> None:
        """The normal schedule's four steps are at timesteps 999, 666, 333 and 0."""
        found = keys_seen(patch(sigma, start_percent=0.2, end_percent=0.9), steps=4)
        assert found == [[16] * 3, [4] * 3, [4] * 3, [16] * 3]

    def test_the_step_is_looked_at_once_for_all_patches_and_only_if_it_matters(self, sigma, monkeypatch) -> None:
        """Each look waits for the GPU."""
        looks = []
        monkeypatch.setattr(core.KVCompression, "active_at", lambda one, at: looks.append(at) or True)
        monkeypatch.setattr(kv_module, "float", lambda value: reads.append(1) or float(value), raising=False)
        reads: list[int] = []
        run(patch(sigma))
        assert (looks, reads) == ([], [])
        run(patch(patch(sigma, last_block=0, end_percent=0.5), first_block=1, end_percent=0.9))
        assert len(reads) == 3 + 3 and len(looks) == 1 + 2 * 3  # once for all steps before the first, then step by step

    def test_a_second_pass_outside_of_its_part_is_told(self, sigma, caplog) -> None:
        early = patch(sigma, end_percent=0.5)
        with caplog.at_level(logging.WARNING):
            sample(early, captions(5), captions(2, seed=1), steps=3)
            sample(patch(sigma), captions(5), captions(2, seed=1), steps=3, denoise=0.3)
            assert not [text for text in caplog.messages if "PixArtKVCompress" in text]
            sample(early, captions(5), captions(2, seed=1), steps=3, denoise=0.3)
        (text,) = [text for text in caplog.messages if "PixArtKVCompress" in text]
        assert "from start_percent 0 to end_percent 0.5: this run's steps lie from 0.7" in text and "set end_percent to 1" in text

    def test_a_run_that_ends_before_its_part_is_told(self, sigma, caplog) -> None:
        """The first two of the normal schedule's four steps, as an advanced sampler takes them."""
        late = patch(patch(sigma, start_percent=0.5, end_percent=0.7), ratio=4, start_percent=0.7)
        with caplog.at_level(logging.WARNING):
            sample(late, captions(5), captions(2, seed=1), steps=4, last_step=2)
        (text,) = [text for text in caplog.messages if "PixArtKVCompress" in text]
        assert "from start_percent 0.5 to end_percent 0.7 and from start_percent 0.7 to end_percent 1: this run's" in text
        assert "set start_percent to 0" in text and "end_percent to 1 for" not in text

    def test_a_run_between_the_parts_is_told(self, sigma, caplog) -> None:
        """Three steps of denoise 0.5 lie from 0.5 to 0.83."""
        parts = patch(patch(sigma, end_percent=0.3), start_percent=0.9)
        with caplog.at_level(logging.WARNING):
            sample(parts, captions(5), captions(2, seed=1), steps=4, denoise=0.5, last_step=3)
        (text,) = [text for text in caplog.messages if "PixArtKVCompress" in text]
        assert "Choose a range that contains one of its steps" in text

    def test_a_part_that_holds_is_enough(self, sigma, caplog) -> None:
        """As in the workflow for 4096 px: a second pass lies in the second part alone."""
        both = patch(patch(sigma, ratio=4, end_percent=0.5), start_percent=0.5)
        with caplog.at_level(logging.WARNING):
            sample(both, captions(5), captions(2, seed=1), steps=3, denoise=0.3)
        assert not [text for text in caplog.messages if "PixArtKVCompress" in text]

    def test_two_nodes(self, sigma) -> None:
        first = patch(sigma, last_block=0)
        assert keys_seen(patch(first, ratio=4, first_block=2)) == [[4, 16, 1]]
        assert keys_seen(first) == [[4, 16, 16]]
        halves = patch(patch(sigma, ratio=4, end_percent=0.5), ratio=2, start_percent=0.5)
        assert keys_seen(halves, steps=4) == [[1] * 3, [1] * 3, [4] * 3, [4] * 3]

    def test_lora_before_and_after(self, sigma, models: Path) -> None:
        save_file(native()[0], str(models / "loras" / "test.safetensors"))

        def with_lora(model):
            return host_nodes.LoraLoaderModelOnly().load_lora_model_only(model, "test.safetensors", 1.0)[0]

        both = run(patch(with_lora(sigma)))
        assert torch.equal(both, run(with_lora(patch(sigma))))
        assert difference(both, run(patch(sigma))) > 1e-2 and difference(both, run(with_lora(sigma))) > 1e-4

    def test_with_block_replacement_and_control(self, sigma) -> None:
        patched = patch(sigma, last_block=1)
        replaced = patched.clone()
        replaced.set_model_patch_replace(lambda args, extra: extra["original_block"](args), "dit", "double_block", 1)
        assert torch.equal(run(replaced), run(patched)) and keys_seen(replaced) == [[4, 4, 16]]
        residual = torch.randn(2, 16, 144, generator=torch.Generator().manual_seed(0))
        both = controlled(patched, {"input": [residual]})
        assert difference(both, run(patched)) > 1e-3 and difference(both, controlled(sigma, {"input": [residual]})) > 1e-4

    @pytest.mark.parametrize("backend", ["attention_basic", "attention_sub_quad", "attention_split", "attention_pytorch"])
    def test_cut_cells_in_a_batch_on_every_attention(self, sigma, sigma_file: Path, backend: str, monkeypatch) -> None:
        """5 x 7 tokens in cells of 2 x 2: those at the edge weigh less, which backends take as floats added to the scores."""
        monkeypatch.setattr(host_attention, "optimized_attention", getattr(host_attention, backend))
        compression = (core.KVCompression(2, first_block=1),)
        latent, step, states = noise(9, 13, 3), torch.tensor([999.0, 500.0, 30.0]), captions(7, batch=3)[0][0]
        mask = torch.arange(7)[None] < torch.tensor([[7], [2], [4]])
        found = forward(sigma, latent, step, states, context_mask=mask, kv_compression=compression)
        expected = load.load_transformer(sigma_file)(latent, step, states, mask, kv_compression=compression)[:, :4]
        assert difference(found, expected) < 1e-5

    def test_with_perturbed_attention(self, sigma) -> None:
        """Either way round; both count, also in the second prediction."""

        def perturbed(model):
            return guide(model, "perturbed attention", "1", 3.0, 0.0, 1.0)

        both = run(perturbed(patch(sigma)))
        assert torch.equal(both, run(patch(perturbed(sigma))))
        assert difference(both, run(patch(sigma))) > 1e-4 and difference(both, run(perturbed(sigma))) > 1e-4

    def test_areas_are_measured_by_their_own_tokens(self, sigma) -> None:
        """The whole has 24 tokens, its upper half 12: only the whole is compressed."""
        area = host_nodes.ConditioningSetArea().append(captions(5, seed=3), 96, 32, 0, 0, 1.0)[0]
        seen = []

        def override(function, q, k, v, *args, **kwargs):
            seen.append((q.shape[1], k.shape[1]))
            return function(q, k, v, *args, **kwargs)

        watched = patch(sigma, min_tokens=13).clone()
        watched.model_options["transformer_options"]["optimized_attention_override"] = override
        sample(watched, captions(5) + area, captions(2, seed=1), torch.zeros(1, 4, 8, 12), steps=1)
        assert set(seen[::2]) == {(24, 6), (12, 12)}

    def test_torch_compile_of_the_host(self, sigma) -> None:
        """Compressed behind the node; the other order is in test_compile.py."""
        values = {"last_block": 1, "end_percent": 0.5}
        both = patch(compiled(sigma), **values)
        assert difference(run(both), run(patch(sigma, **values))) < 1e-5

    def test_other_wrappers_may_hand_the_options_on_by_name(self, sigma) -> None:
        patched = sigma.clone()

        def wrapper(executor, *args, **kwargs):
            return executor(*args[:5], transformer_options=args[5], **kwargs)

        patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", wrapper)
        assert keys_seen(patch(patched)) == [[4, 4, 4]]


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"first_block": 3}, "PixArtKVCompress: first_block is 3; expected 0 to 2"),
            ({"last_block": 27}, "PixArtKVCompress: last_block is 27; expected 0"),
            ({"start_percent": 0.7, "end_percent": 0.2}, "PixArtKVCompress: end_percent is 0.2; expected more than start_percent 0.7"),
            ({"ratio": 1}, "PixArtKVCompress: ratio is 1; expected 2 to 8"),
            ({"method": "conv"}, "PixArtKVCompress: method is 'conv'; expected one of mean, stride"),
        ],
    )
    def test_bad_values(self, sigma, changes: dict, message: str) -> None:
        with pytest.raises(errors.InputError, match=message):
            patch(sigma, **changes)

    def test_a_block_twice(self, sigma) -> None:
        with pytest.raises(errors.InputError, match=r"PixArtKVCompress: block\(s\) 1 are compressed already"):
            patch(patch(sigma, last_block=1), first_block=1, last_block=1)

    def test_models_that_are_no_pixart(self) -> None:
        other = SimpleNamespace(model=object.__new__(comfy.model_base.SDXL))
        with pytest.raises(errors.InputError, match="PixArtKVCompress: this model is a SDXL; expected a PixArt"):
            patch(other)

    def test_the_hosts_own_pixart(self) -> None:
        other = SimpleNamespace(model=object.__new__(comfy.model_base.PixArt))
        with pytest.raises(errors.InputError, match="PixArtKVCompress: this PixArt was loaded by ComfyUI's own loader.*PixArtModelLoader"):
            patch(other)


def test_defaults_of_the_node_are_the_cores() -> None:
    given = {name: spec[1].get("default") for name, spec in node.INPUT_TYPES()["required"].items() if name != "model"}
    assert given == {name: getattr(core.KVCompression(), name) for name in given}
