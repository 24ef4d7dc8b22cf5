"""Nodes that can't do anything on PixArt say so once; NAGuidance works on cross-attention."""

from __future__ import annotations

import importlib
import logging
import sys
from types import SimpleNamespace

import pytest
import torch

from tests.support import host
from tests.support.host_models import captions, difference, sample

silent = host.pack_module("nodes.host.silent_nodes")


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch):
    """A graph that the host is running: node id -> (class, inputs)."""

    def run(nodes: dict[str, tuple[str, dict]]) -> None:
        graph = {number: {"class_type": kind, "inputs": inputs} for number, (kind, inputs) in nodes.items()}
        queue = SimpleNamespace(currently_running={0: (0, "id", graph, {}, [])})
        server = SimpleNamespace(PromptServer=SimpleNamespace(instance=SimpleNamespace(prompt_queue=queue)))
        monkeypatch.setitem(sys.modules, "server", server)

    return run


@pytest.mark.parametrize("kind", [*silent.WITHOUT_EFFECT, *silent.ON_CONDITIONING])
def test_one_warning_that_names_the_node(sigma, running, kind: str, caplog) -> None:
    running({
        "1": ("PixArtModelLoader", {}), "2": ("LoraLoaderModelOnly", {"model": ["1", 0]}),
        "3": (kind, {"model": ["2", 0], "model1": ["2", 0]}), "4": ("KSampler", {"model": ["3" if kind in silent.WITHOUT_EFFECT else "2", 0], "positive": ["3", 0]}),
    })  # fmt: skip
    sigma.model._warned.clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            sample(sigma, captions(3), captions(1), steps=1)
    assert len([text for text in caplog.messages if f"the node {kind} has no effect" in text]) == 1
    sigma.model._warned.clear()


def test_a_branch_of_another_model_is_none_of_ours(running) -> None:
    running(
        {
            "1": ("UNETLoader", {}),
            "2": ("HyperTile", {"model": ["1", 0]}),
            "3": ("PixArtModelLoader", {}),
            "4": ("KSampler", {"model": ["3", 0]}),
        }
    )
    assert not list(silent.silent_warnings())


def test_the_names_are_the_hosts() -> None:
    """A node that is renamed would go unnoticed."""
    files = [path.read_text(encoding="utf-8") for path in (host.host_path() / "comfy_extras").glob("nodes_*.py")]
    known = "\n".join([*files, (host.host_path() / "nodes.py").read_text(encoding="utf-8")])
    newer = {"ScaleROPE", "FluxKVCache", "ReferenceLatent", "FluxGuidance"}  # not on every supported host
    missing = [name for name in (*silent.WITHOUT_EFFECT, *silent.ON_CONDITIONING) if name not in known and name not in newer]
    assert not missing


def nag(model, scale: float = 5.0, alpha: float = 0.5):
    try:
        node = importlib.import_module("comfy_extras.nodes_nag").NAGuidance
    except ImportError:
        pytest.skip("this host has no NAGuidance")
    return node.execute(model, scale, alpha, 1.5).result[0]


def test_nag_guides_away_from_the_negative_prompt_at_cfg_1(sigma) -> None:
    """Its negative prompt counts although cfg 1 needs no second prediction."""

    def draw(model, negative):
        return sample(model, captions(5), negative, steps=2, cfg=1.0)

    plain = draw(sigma, captions(4, seed=2))
    guided, other = draw(nag(sigma), captions(4, seed=2)), draw(nag(sigma), captions(6, seed=3))
    assert difference(guided, plain) > 1e-4 and difference(other, guided) > 1e-5
    assert difference(draw(nag(sigma, alpha=0.0), captions(4, seed=2)), plain) < 1e-6
    assert torch.equal(draw(sigma, captions(4, seed=2)), plain)


def test_nag_by_its_formula(sigma) -> None:
    """The output of the last block's cross-attention, beside the formula on the plain one (arXiv:2505.21179)."""
    model, block, seen = nag(sigma), sigma.model.diffusion_model.blocks[0], []
    handle = block.cross_attn.register_forward_hook(lambda _, __, out: seen.append(out.detach().clone()))
    try:
        sample(sigma, captions(5), captions(4, seed=2), steps=1, cfg=4.5)
        patches = model.model_options["transformer_options"]["patches"]["attn1_output_patch"]
        out = patches[0](seen[0].clone(), {"cond_or_uncond": [1, 0]})
    finally:
        handle.remove()
    negative, positive = seen[0]
    guided = 5 * positive - 4 * negative
    ratio = guided.abs().sum(-1, keepdim=True) / positive.abs().sum(-1, keepdim=True)
    expected = 0.5 * guided * (ratio.clamp(max=1.5) / ratio) + 0.5 * positive
    torch.testing.assert_close(out[1], expected, atol=1e-4, rtol=1e-3)
