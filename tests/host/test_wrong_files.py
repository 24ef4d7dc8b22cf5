"""Wrong files through the queue: the node fails and says which file, what was found, what was expected."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from launch import graph as workflow
from launch.client import ComfyClient, Graph, QueueError
from tests.support.demo import DEMO
from tests.support.graphs import node_of, picture
from tests.support.tiny_models import random_weights
from tests.support.tiny_text import save_t5_file, tiny_t5


def truncated(path: Path) -> None:
    path.write_bytes(DEMO["vae"].read_bytes()[:5000])


def empty(path: Path) -> None:
    path.touch()


def autoencoder(path: Path) -> None:
    path.write_bytes(DEMO["vae"].read_bytes())


def unet(path: Path) -> None:
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3)}, path)


def lora(path: Path) -> None:
    save_file({"transformer.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.zeros(4, 216)}, path)


def not_a_number(path: Path) -> None:
    weights = random_weights()
    weights["blocks.1.mlp.fc1.weight"][3, 5] = float("nan")
    save_file(weights, path)


def missing_key(path: Path) -> None:
    weights = random_weights()
    del weights["blocks.1.mlp.fc1.weight"]
    save_file(weights, path)


def extra_key(path: Path) -> None:
    save_file(random_weights() | {"blocks.1.unheard_of.weight": torch.zeros(3)}, path)


def wrong_shape(path: Path) -> None:
    save_file(random_weights() | {"blocks.1.mlp.fc1.weight": torch.zeros(5, 7)}, path)


class Payload:
    """Code that an unguarded unpickler would run."""

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(Payload.target),)

    target: Path


def pickle_with_code(path: Path) -> None:
    Payload.target = path.parent / "the-code-ran"
    torch.save({"state_dict": {"x": Payload()}}, path)


def raw_pickle(path: Path) -> None:
    Payload.target = path.parent / "the-code-ran"
    path.write_bytes(pickle.dumps(Payload()))


CASES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "truncated": ("truncated.safetensors", truncated, "truncated|incomplete|header|corrupt"),
    "empty": ("empty.safetensors", empty, "empty|header|0 bytes"),
    "vae": ("a-vae.safetensors", autoencoder, "VAE|autoencoder|taesd"),
    "unet": ("sdxl.safetensors", unet, "PixArt"),
    "lora": ("a-lora.safetensors", lora, "(?i)lora"),
    "nan": ("nan.safetensors", not_a_number, r"(?i)nan(?s:.*)blocks\.1\.mlp\.fc1|blocks\.1\.mlp\.fc1(?s:.*)(?i:nan)"),
    "missing key": ("missing.safetensors", missing_key, r"(?s)(?i:missing).*blocks\.1\.mlp\.fc1\.weight"),
    "extra key": ("extra.safetensors", extra_key, r"blocks\.1\.unheard_of"),
    "wrong shape": ("shape.safetensors", wrong_shape, r"(?s)blocks\.1\.mlp\.fc1\.weight.*5.*7"),
    "code": ("code.pth", pickle_with_code, "(?i)pickle|weights.only|unsafe|code"),
    "raw pickle": ("raw.pth", raw_pickle, "(?i)pickle|weights.only|unsafe|code"),
}


@pytest.mark.parametrize("case", CASES)
def test_wrong_transformer_files(client: ComfyClient, base: Path, demo_graph: Graph, case: str) -> None:
    name, write, message = CASES[case]
    write(base / "models/diffusion_models" / name)
    node_of(demo_graph, "PixArtModelLoader").update(model_name=name, variant="auto")
    with pytest.raises(QueueError, match=message) as caught:
        client.run(demo_graph)
    assert caught.value.details["node_type"] == "PixArtModelLoader"
    assert name in str(caught.value)
    assert not (base / "models/diffusion_models/the-code-ran").exists()


def test_the_host_still_draws_after_a_wrong_file(client: ComfyClient, base: Path, demo_graph: Graph) -> None:
    empty(base / "models/diffusion_models/nothing.safetensors")
    loader = node_of(demo_graph, "PixArtModelLoader")
    right = dict(loader)
    loader.update(model_name="nothing.safetensors")
    with pytest.raises(QueueError):
        client.run(demo_graph)
    loader.update(right)
    assert picture(client, demo_graph).shape == (256, 256, 3)


def test_a_text_encoder_of_another_width_is_refused(client: ComfyClient, base: Path, demo_graph: Graph) -> None:
    save_t5_file(tiny_t5(width=32), base / "models/text_encoders/narrow.safetensors")
    node_of(demo_graph, "PixArtT5Loader")["t5_name"] = "narrow.safetensors"
    with pytest.raises(QueueError, match=r"(?s)32.*128|128.*32"):
        client.run(demo_graph)


@pytest.mark.parametrize("write", [truncated, empty, autoencoder, lora], ids=lambda w: w.__name__)
def test_wrong_text_encoder_files(client: ComfyClient, base: Path, demo_graph: Graph, write: Callable[[Path], None]) -> None:
    name = f"t5-{write.__name__}.safetensors"
    write(base / "models/text_encoders" / name)
    node_of(demo_graph, "PixArtT5Loader")["t5_name"] = name
    with pytest.raises(QueueError) as caught:
        client.run(demo_graph)
    assert caught.value.details["node_type"] == "PixArtT5Loader"
    assert name in str(caught.value)


@pytest.mark.parametrize("size", [(0, 256), (256, 0), (-8, 256)])
def test_sizes_below_one_are_refused_before_anything_runs(client: ComfyClient, demo_graph: Graph, size: tuple[int, int]) -> None:
    workflow.configure(demo_graph, {"width": size[0], "height": size[1]})
    with pytest.raises(QueueError, match="(?i)smaller than min"):
        client.queue(demo_graph)


def test_size_17x33_takes_the_nearest_bin(client: ComfyClient, demo_graph: Graph) -> None:
    from pixart import nearest_bin

    workflow.configure(demo_graph, {"width": 17, "height": 33, "steps": 1})
    expected = nearest_bin(256, 17, 33)
    assert picture(client, demo_graph).shape == (expected.height, expected.width, 3)


def test_a_name_outside_the_model_folders_is_refused(client: ComfyClient, demo_graph: Graph) -> None:
    node_of(demo_graph, "PixArtModelLoader")["model_name"] = "../../../etc/passwd"
    with pytest.raises(QueueError):
        client.run(demo_graph)
