"""What other packs hook into a DiT: each hook changes the picture, and leaves no trace when it is removed."""
from __future__ import annotations

import comfy.controlnet
import comfy.ldm.modules.attention as host_attention
import pytest
import torch
from comfy.patcher_extension import WrappersMP

from tests.support import host
from tests.support.host_models import CAPTIONS, captions, difference, forward, noise, sample, to_device

errors = host.pack_module("pixart.errors")
attention = host.pack_module("nodes.host.attention")
BACKENDS = ("attention_basic", "attention_sub_quad", "attention_split", "attention_pytorch")


@pytest.fixture
def run(sigma):
    """Samples with a model and returns the latent; the unpatched picture comes along as `run.plain`."""

    def run(model):
        return sample(model, captions(5), captions(2, seed=1))

    run.plain = run(sigma)
    return run


def test_wrapper_of_the_network(sigma, run) -> None:
    patched, seen = sigma.clone(), []

    def wrapper(executor, *args, **kwargs):
        seen.append(set(args[-1]))  # EasyCache and others look for transformer_options in the last place
        return executor(*args, **kwargs) * 0.5

    patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", wrapper)
    assert difference(run(patched), run.plain) > 1e-2
    assert len(seen) == 3 and "sigmas" in seen[0]
    patched.remove_wrappers_with_key(WrappersMP.DIFFUSION_MODEL, "test")
    assert torch.equal(run(patched), run.plain) and torch.equal(run(sigma), run.plain)


class TestBlockReplacement:
    def test_arguments_and_identity(self, sigma, run) -> None:
        """A replacement that calls the original block sees Flux's arguments and changes nothing."""
        patched, seen = sigma.clone(), []

        def replacement(args, extra):
            seen.append({**args, "transformer_options": dict(args["transformer_options"])})
            return extra["original_block"](args)

        patched.set_model_patch_replace(replacement, "dit", "double_block", 1)
        assert torch.equal(run(patched), run.plain)
        args = seen[0]
        assert set(args) == {"img", "txt", "vec", "pe", "attn_mask", "transformer_options"}
        assert args["img"].shape == (2, 16, 144) and args["txt"].shape == (2, 5, 144) and args["vec"].shape == (2, 6, 144)
        assert args["attn_mask"].sum(dim=1).sort().values.tolist() == [2, 5] and args["pe"] is None
        assert args["transformer_options"]["block_index"] == 1
        assert args["transformer_options"]["total_blocks"] == 3

    def test_skipping_a_block(self, sigma, run) -> None:
        patched = sigma.clone()
        patched.set_model_patch_replace(lambda args, extra: args, "dit", "double_block", 1)
        assert difference(run(patched), run.plain) > 1e-3
        assert torch.equal(run(sigma), run.plain)

    def test_mask_stays_where_a_replacement_leaves_it_out(self, sigma, run) -> None:
        patched = sigma.clone()

        def replacement(args, extra):
            return extra["original_block"]({name: args[name] for name in ("img", "txt", "vec")})

        patched.set_model_patch_replace(replacement, "dit", "double_block", 1)
        assert torch.equal(run(patched), run.plain)

    def test_changed_arguments_reach_the_block(self, sigma, run) -> None:
        for name in ("img", "txt", "vec"):
            patched = sigma.clone()
            patched.set_model_patch_replace(
                lambda args, extra, name=name: extra["original_block"]({**args, name: args[name] * 1.5}), "dit", "double_block", 0
            )
            assert difference(run(patched), run.plain) > 1e-4, name

    def test_skip_layer_guidance_of_the_host(self, sigma, run) -> None:
        from comfy_extras.nodes_slg import SkipLayerGuidanceDiT

        node = SkipLayerGuidanceDiT
        when = {"start_percent": 0.0, "end_percent": 1.0}
        arguments = dict(model=sigma, double_layers="1", single_layers="", scale=3.0, rescaling_scale=0.0, **when)
        patched = node.execute(**arguments).result[0] if hasattr(node, "execute") else node().skip_guidance(**arguments)[0]
        assert difference(run(patched), run.plain) > 1e-3


class Residuals(comfy.controlnet.ControlBase):
    """A ControlNet that gives fixed residuals; the smallest that the host accepts."""

    def __init__(self, control: dict) -> None:
        super().__init__()
        self.control = control

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        return self.control

    def pre_run(self, model, percent_to_timestep_function):
        """Nothing to prepare."""

    def get_models(self):
        return []

    def copy(self):
        return Residuals(self.control)

    def cleanup(self):
        """Nothing to clean."""


def controlled(model, control: dict) -> torch.Tensor:
    """Samples with residuals on both prompts."""
    net = Residuals(to_device(model, control))
    entries = [captions(5), captions(2, seed=1)]
    for entry in entries:
        entry[0][1].update(control=net, control_apply_to_uncond=False)
    return sample(model, *entries)


class TestControl:
    def test_residual_is_added_after_its_block(self, sigma) -> None:
        """The same sum through block replacement."""
        latent, step, states = noise(), torch.tensor([400.0]), captions(5)[0][0]
        residual = torch.randn(1, 16, 144)
        found = forward(sigma, latent, step, states, control={"input": [None, residual], "middle": [], "output": []})

        def add(args, extra):
            return {"img": extra["original_block"](args)["img"] + residual}

        options = {"patches_replace": {"dit": {("double_block", 1): add}}}
        expected = forward(sigma, latent, step, states, transformer_options=options)
        assert difference(found, expected) < 1e-6
        assert difference(found, forward(sigma, latent, step, states)) > 1e-3

    def test_through_the_sampler_and_gone_again(self, sigma, run) -> None:
        residual = torch.randn(2, 16, 144, generator=torch.Generator().manual_seed(0))
        assert difference(controlled(sigma, {"input": [residual]}), run.plain) > 1e-3
        assert torch.equal(run(sigma), run.plain)

    @pytest.mark.parametrize(
        ("control", "named"),
        [
            ({"input": [torch.zeros(2, 15, 144)]}, r"\(2, 15, 144\)"),
            ({"input": [torch.zeros(2, 16, 1152)]}, "1152"),
            ({"input": [None] * 3 + [torch.zeros(2, 16, 144)]}, r"blocks \[3\]"),
            ({"input": [], "output": [torch.zeros(2, 320, 8, 8)]}, "output"),
        ],
    )
    def test_control_of_another_model_is_refused(self, sigma, control: dict, named: str) -> None:
        with pytest.raises(errors.InputError, match=named) as caught:
            controlled(sigma, control)
        assert "isn't for this PixArt model" in str(caught.value)


class TestAttention:
    def test_override(self, sigma, run) -> None:
        patched, seen = sigma.clone(), []

        def override(function, *args, **kwargs):
            seen.append((kwargs["transformer_options"]["block_index"], kwargs.get("mask") is not None))
            return function(*args, **kwargs) * 0.9

        patched.model_options["transformer_options"]["optimized_attention_override"] = override
        assert difference(run(patched), run.plain) > 1e-3
        assert seen[:6] == [(0, False), (0, True), (1, False), (1, True), (2, False), (2, True)]  # self, cross, ...
        del patched.model_options["transformer_options"]["optimized_attention_override"]
        assert torch.equal(run(patched), run.plain)

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("masked", [True, False])
    def test_every_backend_agrees_with_plain_torch(self, sigma, backend: str, masked: bool, monkeypatch) -> None:
        core = host.pack_module("pixart.attention")
        q, k, v = (torch.randn(3, n, 144, generator=torch.Generator().manual_seed(n)) for n in (16, 9, 10))
        k = torch.cat([k, k[:, :1]], dim=1)
        mask = torch.arange(10)[None] < torch.tensor([[10], [1], [4]]) if masked else None
        monkeypatch.setattr(host_attention, "optimized_attention", getattr(host_attention, backend))
        found = attention.host_attention(q, k, v, heads=2, mask=mask, options={})
        assert difference(found, core.torch_attention(q, k, v, heads=2, mask=mask)) < 1e-5

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_masks_in_half_precision(self, backend: str, dtype: torch.dtype, monkeypatch) -> None:
        """A masked token must weigh nothing, and no row may become NaN."""
        q, k, v = (torch.randn(2, n, 144, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (16, 8, 8))
        v[:, 3:] = 1000.0
        mask = torch.arange(8)[None].expand(2, 8) < 3
        monkeypatch.setattr(host_attention, "optimized_attention", getattr(host_attention, backend))
        out = attention.host_attention(q, k, v, heads=2, mask=mask, options={})
        assert torch.isfinite(out).all() and out.abs().max() < 10

    @pytest.mark.parametrize("name", ["attention_sage", "attention_flash", "attention3_sage"])
    def test_backends_without_masks_are_passed_by(self, name: str, monkeypatch) -> None:
        """Where they would drop a mask silently, or complain at every call."""

        def maskless(q, k, v, heads, mask=None, **kwargs):
            assert mask is None
            return torch.zeros_like(q)

        maskless.__name__ = name
        monkeypatch.setattr(host_attention, "optimized_attention", maskless)
        monkeypatch.setattr(host_attention, "SAGE_ATTENTION_SUPPORTS_MASK", False, raising=False)
        q = torch.randn(1, 4, 144)
        mask = torch.tensor([[True, True, False, False]])
        assert attention.host_attention(q, q, q, heads=2, mask=mask).abs().max() > 0
        assert attention.host_attention(q, q, q, heads=2).abs().max() == 0  # unmasked calls still use it


def test_options_of_the_caller_are_not_changed(sigma) -> None:
    options = {"patches_replace": {"dit": {}}, "cond_or_uncond": [0]}
    forward(sigma, noise(), torch.tensor([1.0]), captions(3)[0][0], transformer_options=options)
    assert options == {"patches_replace": {"dit": {}}, "cond_or_uncond": [0]}


def test_unknown_arguments_raise(sigma) -> None:
    with pytest.raises(TypeError, match="guidance"):
        forward(sigma, noise(), torch.tensor([1.0]), captions(3)[0][0], guidance=torch.ones(1))


NOT_OURS = {"pe_interpolation", "pe_precision"}  # our positions come from position_range


def test_public_attributes_are_those_of_the_hosts_own_pixart(sigma) -> None:
    """Nodes read them, as RenormCFG does in_channels."""
    import comfy.ops
    from comfy.ldm.pixart.pixartms import PixArtMS

    config = sigma.model.diffusion_model.config
    sizes = {"micro_condition": False, "hidden_size": config.hidden_size, "depth": config.depth, "num_heads": config.num_heads, "caption_channels": CAPTIONS}
    native = PixArtMS(input_size=None, pe_interpolation=None, operations=comfy.ops.disable_weight_init, **sizes)
    wanted = {name: value for name, value in vars(native).items() if isinstance(value, int) and not name.startswith("_")}
    wanted = {name: value for name, value in wanted.items() if name not in NOT_OURS | {"training"}}
    assert wanted.keys() >= {"in_channels", "out_channels", "depth"}
    assert {name: getattr(sigma.model.diffusion_model, name, None) for name in wanted} == wanted


def test_renorm_cfg_runs(sigma, run) -> None:
    try:
        from comfy_extras.nodes_lumina2 import RenormCFG
    except ImportError:
        pytest.skip("this host has no RenormCFG")
    node = RenormCFG.execute if hasattr(RenormCFG, "execute") else RenormCFG().patch
    made = node(sigma, 100.0, 0.5)
    assert difference(run(getattr(made, "result", made)[0]), run.plain) > 1e-4


def test_hooks_are_undone_between_two_pictures(sigma, run) -> None:
    """All at once, then none."""
    patched = sigma.clone()
    patched.set_model_patch_replace(lambda args, extra: args, "dit", "double_block", 0)
    patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", lambda executor, *a, **k: executor(*a, **k) * 0.9)
    patched.model_options["transformer_options"]["optimized_attention_override"] = lambda f, *a, **k: f(*a, **k) * 0.9
    assert difference(run(patched), run.plain) > 1e-2
    assert torch.equal(run(sigma), run.plain)
