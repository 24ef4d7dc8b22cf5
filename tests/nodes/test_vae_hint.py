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
    """Puts a graph with these VAELoader names, and other nodes as {id: (class, inputs)}, into a running server's queue."""

    def run(*names: str, **others: tuple[str, dict]) -> None:
        nodes = {str(i): {"class_type": "VAELoader", "inputs": {"vae_name": name}} for i, name in enumerate(names)}
        nodes |= {number: {"class_type": kind, "inputs": inputs} for number, (kind, inputs) in others.items()}
        nodes["x"] = {"class_type": "VAEDecode", "inputs": {"vae": ["0", 0]}}
        queue = SimpleNamespace(currently_running={0: (0, "id", nodes, {}, ["x"])})
        server = SimpleNamespace(PromptServer=SimpleNamespace(instance=SimpleNamespace(prompt_queue=queue)))
        monkeypatch.setitem(sys.modules, "server", server)

    return run


@pytest.mark.parametrize(
    ("name", "kind"),
    [("sdxl_vae.safetensors", "sdxl"), ("sub/SDXL-VAE-fp16-fix.safetensors", "sdxl"), ("taesdxl", "sdxl"),
     ("vae-ft-mse-840000-ema-pruned.safetensors", "sd1"), ("taesd", "sd1"), ("ae.safetensors", "flux"),
     ("pixart-demo-vae.safetensors", "demo"), ("my_vae.safetensors", None), ("taesd3", "sd3"), ("wan_2.1_vae.safetensors", "other")],
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


@pytest.mark.parametrize(
    ("kind", "inputs", "warned"),
    [("CheckpointLoaderSimple", {"ckpt_name": "v1-5-pruned-emaonly.safetensors"}, False),
     ("CheckpointLoaderSimple", {"ckpt_name": "sd_xl_base_1.0.safetensors"}, True),
     ("CheckpointLoaderSimple", {"ckpt_name": ["3", 0]}, False),
     ("VAELoaderKJ", {"vae_name": "vae-ft-mse-840000-ema-pruned.safetensors"}, False),
     ("VAELoaderKJ", {"vae_name": "sdxl_vae.safetensors"}, True),
     ("UnknownLoader", {}, False)],
)  # fmt: skip
def test_alphas_vae_from_a_checkpoint_or_another_packs_loader(kind: str, inputs: dict, warned: bool, graph) -> None:
    """Only where one is used: many graphs load a checkpoint for something else."""
    graph(checkpoint=(kind, inputs), decode=("VAEDecode", {"vae": ["checkpoint", 2]}))
    text = hint.vae_warning("sd1")
    assert bool(text) is warned and (not warned or "xl" in text)
    graph(checkpoint=(kind, inputs), decode=("KSampler", {"model": ["checkpoint", 0]}))
    assert hint.vae_warning("sd1")
    graph("sdxl_vae.safetensors", checkpoint=(kind, inputs), decode=("KSampler", {"model": ["checkpoint", 0]}))
    assert "sdxl_vae" in hint.vae_warning("sd1")


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
    graph(decoder=("PixArtConsistencyDecoder", {"vae_name": "whatever"}))
    assert hint.vae_warning("sd1") is None
    assert "consistency" in hint.vae_warning("sdxl")


REFINER = "sd_xl_refiner_1.0.safetensors"


def sampler(model: str, latent: str, kind: str = "KSampler") -> tuple[str, dict]:
    """A sampler's node."""
    return kind, {"model": [model, 0], "latent_image": [latent, 0], "seed": 0}


def two_passes(second: str = "drawn", refiner: str = REFINER, **more: tuple[str, dict]) -> dict:
    """PixArt's sampler, and a refiner's, whose latent is the node `second`."""
    return {
        "pixart": ("PixArtModelLoader", {"model_name": "alpha.pth"}), "empty": ("EmptyLatentImage", {"width": 1024}),
        "drawn": sampler("pixart", "empty"), "refiner": ("CheckpointLoaderSimple", {"ckpt_name": refiner}),
        "decoded": ("VAEDecode", {"samples": ["drawn", 0], "vae": ["0", 0]}), "refined": sampler("refiner", second), **more,
    }  # fmt: skip


ENCODED = ("VAEEncode", {"pixels": ["decoded", 0], "vae": ["1", 0]})
MASKED = ("SetLatentNoiseMask", {"samples": ["encoded", 0], "mask": ["mask", 0]})
GRAPHS = {  # nodes, and whether the refiner gets PixArt's own latent
    "direct": (two_passes(), True),
    "no refiner": (two_passes(refiner="sd_xl_base_1.0.safetensors"), False),
    "decoded and encoded": (two_passes("encoded", encoded=ENCODED), False),
    "img2img": (two_passes(picture=("LoadImage", {}), empty=("VAEEncode", {"pixels": ["picture", 0], "vae": ["0", 0]})), True),
    "encoded for something else": (two_passes(encoded=ENCODED), True),
    "enlarged": (two_passes("larger", larger=("LatentUpscaleBy", {"samples": ["drawn", 0], "scale_by": 1.5})), True),
    "a mask from its picture": (
        two_passes("masked", encoded=ENCODED, masked=MASKED, mask=("ImageToMask", {"image": ["decoded", 0]})), False
    ),
    "through patches": (
        two_passes(
            drawn=sampler("lora", "empty", "KSamplerAdvanced"), lora=("PixArtLoraLoader", {"model": ["pixart", 0]}),
            refined=("SamplerCustomAdvanced", {"guider": ["guider", 0], "latent_image": ["drawn", 0]}),
            guider=("CFGGuider", {"model": ["refiner", 0], "positive": ["text", 0]}),
        ),
        True,
    ),
    "two refining passes": (two_passes("first", first=sampler("refiner", "drawn")), True),
    "SDXL between": (
        two_passes("base", encoded=ENCODED, base=sampler("sdxl", "encoded"), sdxl=("CheckpointLoaderSimple", {"ckpt_name": "sd_xl_base"})),
        False,
    ),
    "a circle": (two_passes("a", a=("LatentFlip", {"samples": ["b", 0]}), b=("LatentFlip", {"samples": ["a", 0]})), False),
}  # fmt: skip


@pytest.mark.parametrize("case", GRAPHS)
def test_a_refiner_that_gets_alphas_latent_is_named(graph, case: str) -> None:
    nodes, warned = GRAPHS[case]
    graph("taesd", "sdxl_vae", **nodes)
    text = hint.refiner_warning("alpha")
    assert bool(text) is warned
    if text:
        assert "VAEEncode" in text and REFINER in text
    assert hint.refiner_warning("sigma") is None


def test_the_refiner_warning_reaches_the_log(alpha_1024_file, graph, caplog) -> None:
    graph("taesd", **two_passes())
    sample(host_models.load_model(alpha_1024_file), captions(3), captions(1), steps=1)
    assert sum("reads SDXL latents" in message for message in caplog.messages) == 1
