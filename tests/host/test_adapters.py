"""Through the real queue: a LoRA stack, perturbed-attention guidance and regional prompts do what they are for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from demo.data.reader import read_picture
from launch import graph as workflow
from launch.client import ComfyClient, Graph, QueueError
from tests.support.demo import ROOT
from tests.support.graphs import insert, node_of, picture, pictures

STACK = ("pixart-demo-red-blue.safetensors", "pixart-demo-green-yellow.safetensors")


def api(stem: str) -> Graph:
    """A workflow of the pack."""
    return workflow.load(ROOT / f"workflows/api/{stem}.json")


def colors(image: np.ndarray) -> set[str]:
    """Colours of the objects in a picture."""
    return {found.color for found in read_picture(image).objects}


def test_each_lora_of_the_stack_swaps_its_words(client: ComfyClient) -> None:
    """Strength 0 takes one off, as bypassing the node does."""
    for strengths, expected in (((0, 0), {"red", "green"}), ((1, 0), {"blue", "green"}), ((1, 1), {"blue", "yellow"})):
        graph = api("lora-stack")
        for node in graph.values():
            if node["class_type"] == "PixArtLoraLoader":
                node["inputs"]["strength"] = float(strengths[STACK.index(node["inputs"]["lora_name"])])
        assert colors(picture(client, graph)) == expected


def test_pag_changes_the_picture_and_keeps_its_subject(client: ComfyClient) -> None:
    with_pag, without = pictures(client, api("pag"))
    assert np.abs(with_pag - without).mean() > 0.002
    assert colors(with_pag) == {"green", "yellow"}


def test_each_region_follows_its_own_prompt(client: ComfyClient) -> None:
    image = picture(client, api("regional-prompts"))
    for half, color in ((image[:, :256], "red"), (image[:, 256:], "blue")):
        assert color in colors(half)


def test_a_lora_for_another_model_is_an_error_in_the_queue(client: ComfyClient, base: Path, demo_graph: Graph) -> None:
    module = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {f"{module}.lora_up.weight": torch.randn(8, 2), f"{module}.lora_down.weight": torch.randn(2, 8)}
    save_file(tensors, base / "models/loras/sd.safetensors")
    sampler = node_of(demo_graph, "KSampler")
    loader = insert(demo_graph, "PixArtLoraLoader", model=sampler["model"], lora_name="sd.safetensors", strength=1.0)
    sampler["model"] = [loader, 0]
    with pytest.raises(QueueError, match="Stable Diffusion"):
        client.run(demo_graph)
