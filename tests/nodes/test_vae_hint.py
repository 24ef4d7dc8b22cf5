"""A VAE of the wrong family in the running graph is named in the log, once per model."""
from __future__ import annotations

import logging
import sys
from types import SimpleNamespace

import pytest

from tests.support import host, host_models
from tests.support.host_models import captions, sample

hint = host.pack_module("nodes.host.vae_hint")


@pytest.fixture
def graph(monkeypatch: pytest.MonkeyPatch):
    """Puts a graph with these VAELoader names, and other nodes as {class: inputs}, into a running server's queue."""

    def run(*names: str, **others: dict) -> None:
        nodes = {str(i): {"class_type": "VAELoader", "inputs": {"vae_name": name}} for i, name in enumerate(names)}
        nodes |= {kind: {"class_type": kind, "inputs": inputs} for kind, inputs in others.items()}
        nodes["x"] = {"class_type": "VAEDecode", "inputs": {"vae": ["0", 0]}}
        queue = SimpleNamespace(currently_running={0: (0, "id", nodes, {}, ["x"])})
        server = SimpleNamespace(PromptServer=SimpleNamespace(instance=SimpleNamespace(prompt_queue=queue)))
        monkeypatch.setitem(sys.modules, "server", server)

    return run


@pytest.mark.parametrize(
    ("name", "kind"),
    [("sdxl_vae.safetensors", "sdxl"), ("sub/SDXL-VAE-fp16-fix.safetensors", "sdxl"), ("taesdxl", "sdxl"),
     ("vae-ft-mse-840000-ema-pruned.safetensors", "sd1"), ("taesd", "sd1"), ("ae.safetensors", "other"),
     ("pixart-demo-vae.safetensors", "demo"), ("my_vae.safetensors", None), ("taesd3", "other")],
)  # fmt: skip
def test_kind_by_name(name: str, kind: str | None) -> None:
    assert hint.vae_kind(name) == kind


@pytest.mark.parametrize(
    ("wanted", "names", "warned"),
    [("sdxl", ["sdxl_vae.safetensors"], False), ("sdxl", ["vae-ft-mse-840000.safetensors"], True), ("sdxl", ["mine.safetensors"], False),
     ("sdxl", [], False), ("sdxl", ["taesd", "sdxl_vae.safetensors"], False), ("sd1", ["sdxl_vae.safetensors"], True),
     ("sd1", ["vae-ft-ema-560000.safetensors"], False), ("sd1", [], True), ("demo", ["sdxl_vae.safetensors"], True)],
)  # fmt: skip
def test_when_it_warns(wanted: str, names: list[str], warned: bool, graph) -> None:
    graph(*names)
    text = hint.vae_warning(wanted)
    assert bool(text) is warned
    if text:
        assert "VAELoader" in text and all(name in text for name in names)


def test_logged_once_per_model(sigma, graph, caplog) -> None:
    graph("vae-ft-mse-840000-ema-pruned.safetensors")
    with caplog.at_level(logging.WARNING):
        sample(sigma, captions(3), captions(1), steps=1)
        sample(sigma, captions(3), captions(1), steps=1)
    assert sum("SDXL VAE" in message and "vae-ft-mse" in message for message in caplog.messages) == 1


def test_alpha_without_a_graph_is_told_its_vae(alpha_1024_file, caplog) -> None:
    sample(host_models.load_model(alpha_1024_file), captions(3), captions(1), steps=1)
    assert "SD1 VAE" in caplog.text


def test_the_consistency_decoder_is_alphas(graph) -> None:
    graph(PixArtConsistencyDecoder={"vae_name": "whatever"})
    assert hint.vae_warning("sd1") is None
    assert "consistency" in hint.vae_warning("sdxl")


@pytest.mark.parametrize(
    ("family", "others", "warned"),
    [("alpha", {}, False), ("alpha", {"CheckpointLoaderSimple": {"ckpt_name": "sd_xl_refiner_1.0.safetensors"}}, True),
     ("sigma", {"CheckpointLoaderSimple": {"ckpt_name": "sd_xl_refiner_1.0.safetensors"}}, False),
     ("alpha", {"CheckpointLoaderSimple": {"ckpt_name": "sd_xl_base_1.0.safetensors"}}, False),
     ("alpha", {"CheckpointLoaderSimple": {"ckpt_name": "SDXL_Refiner.safetensors"}, "VAEEncode": {}}, False)],
)  # fmt: skip
def test_a_refiner_that_gets_alphas_latent_is_named(graph, family: str, others: dict, warned: bool) -> None:
    graph("taesd", **others)
    text = hint.refiner_warning(family)
    assert bool(text) is warned
    if text:
        assert "VAEEncode" in text and "sd_xl_refiner_1.0" in text


def test_the_refiner_warning_reaches_the_log(alpha_1024_file, graph, caplog) -> None:
    graph("taesd", CheckpointLoaderSimple={"ckpt_name": "sd_xl_refiner_1.0.safetensors"})
    sample(host_models.load_model(alpha_1024_file), captions(3), captions(1), steps=1)
    assert sum("reads SDXL latents" in message for message in caplog.messages) == 1
