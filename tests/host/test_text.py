"""T5 in every precision and prompts from files, through the real queue."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from launch import graph as workflow
from launch.client import ComfyClient, Graph, QueueError
from tests.support.graphs import insert, node_of, picture

OTHER = "a yellow cross on a black background"
QUANTIZED = ("int8", "nf4", "fp4")


def drawn(client: ComfyClient, graph: Graph, prompt: str) -> np.ndarray:
    """The picture of a prompt; after it every model is unloaded."""
    workflow.configure(graph, {"prompt": prompt, "steps": 2})
    found = picture(client, graph)
    client.post("/free", {"unload_models": True})
    return found


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["default", "fp32", "bf16", "fp16", "fp8_e4m3fn", *QUANTIZED])
def test_every_precision_twice_with_unloading(client: ComfyClient, demo_graph: Graph, precision: str) -> None:
    """The other prompt in between makes the host encode the first one again."""
    if precision in QUANTIZED:
        pytest.importorskip("bitsandbytes")
    node_of(demo_graph, "PixArtT5Loader")["precision"] = precision
    first, other, again = (drawn(client, demo_graph, prompt) for prompt in ("a red circle", OTHER, "a red circle"))
    assert np.array_equal(first, again)
    assert np.abs(first - other).mean() > 0.005 and first.std() > 0.02


def test_prompt_file_instead_of_t5(client: ComfyClient, demo_graph: Graph, base: Path) -> None:
    """Save, then the same picture from the file, with no T5 in the graph."""
    encoders = [number for number, node in demo_graph.items() if node["class_type"] == "PixArtTextEncode"]
    for name, number in zip(("positive", "negative"), encoders, strict=True):
        insert(demo_graph, "PixArtSavePrompt", conditioning=[number, 0], filename_prefix=f"queue_{name}", prompt="")
    workflow.configure(demo_graph, {"steps": 2})
    expected = picture(client, demo_graph)
    assert (base / "output/prompts/queue_positive_00001.safetensors").is_file()

    for name, number in zip(("positive", "negative"), encoders, strict=True):
        file = f"queue_{name}_00001.safetensors [output]"
        demo_graph[number] = {"class_type": "PixArtLoadPrompt", "inputs": {"prompt_file": file}}
    without = {n: node for n, node in demo_graph.items() if node["class_type"] not in ("PixArtT5Loader", "PixArtSavePrompt")}
    node_of(without, "SaveImage")["filename_prefix"] = "from_file"
    assert np.array_equal(picture(client, without), expected)


@pytest.mark.parametrize("name", ["../../secret.safetensors", "absent.safetensors"])
def test_prompt_files_elsewhere_are_refused(client: ComfyClient, demo_graph: Graph, name: str) -> None:
    number = next(n for n, node in demo_graph.items() if node["class_type"] == "PixArtTextEncode")
    demo_graph[number] = {"class_type": "PixArtLoadPrompt", "inputs": {"prompt_file": name}}
    with pytest.raises(QueueError, match="not a prompt file"):
        picture(client, demo_graph)


def test_graphs_of_the_first_release_still_run(client: ComfyClient, demo_graph: Graph) -> None:
    """Whose token limit was a number."""
    for node in demo_graph.values():
        if node["class_type"] == "PixArtTextEncode":
            node["inputs"]["max_tokens"] = 300
    workflow.configure(demo_graph, {"steps": 1})
    assert picture(client, demo_graph).shape == (256, 256, 3)
