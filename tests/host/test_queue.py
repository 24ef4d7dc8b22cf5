"""Through the real queue: pictures, sizes, image inputs, LoRA, interrupts and changes of model."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from launch import graph as workflow
from launch.client import ComfyClient, Graph, QueueError
from tests.support.demo import DEMO, ROOT, SECOND_MODEL
from tests.support.graphs import id_of, insert, node_of, picture, pictures


def api(stem: str, steps: int = 3) -> Graph:
    """A workflow of the pack with fewer steps."""
    graph = workflow.load(ROOT / f"workflows/api/{stem}.json")
    for node in graph.values():
        if node["class_type"] == "KSampler":
            node["inputs"]["steps"] = steps
    return graph


def input_picture(name: str) -> np.ndarray:
    """A picture of demo/inputs, float (H, W, channels)."""
    return np.asarray(Image.open(ROOT / "demo/inputs" / name), np.float32) / 255


def test_demo_graph_as_shipped_gives_a_picture_with_its_workflow(client: ComfyClient) -> None:
    graph = workflow.load(ROOT / "workflows/api/demo.json")
    ui = workflow.load(ROOT / "workflows/demo.json")
    workflow.configure(graph, {"seed": 4242})  # a picture of its own, not one that the host remembers
    steps: list[tuple[int, int]] = []
    entry = client.wait(client.queue(graph, ui), on_progress=lambda node, done, total: steps.append((done, total)))
    saved = entry["outputs"][id_of(graph, "SaveImage")]["images"][0]
    image = Image.open(io.BytesIO(client.image(saved)))
    assert image.size == (256, 256)
    assert np.asarray(image).std() > 5
    assert json.loads(image.info["workflow"]) == ui
    assert (20, 20) in steps


def test_seed_and_prompt_decide_the_picture(client: ComfyClient, demo_graph: Graph) -> None:
    first = picture(client, demo_graph)
    workflow.configure(demo_graph, {"prompt": "a yellow cross on a black background"})
    other = picture(client, demo_graph)
    workflow.configure(demo_graph, {"prompt": "a red circle above a blue square", "seed": 5})
    reseeded = picture(client, demo_graph)
    workflow.configure(demo_graph, {"seed": 0})
    node_of(demo_graph, "SaveImage")["filename_prefix"] = "again"
    again = picture(client, demo_graph)
    assert np.abs(other - first).mean() > 0.01
    assert np.abs(reseeded - first).mean() > 0.005
    assert np.array_equal(again, first)


@pytest.mark.parametrize("wanted", [(1000, 250), (200, 400)])
def test_a_wanted_size_gives_a_picture_of_the_nearest_bin(client: ComfyClient, demo_graph: Graph, wanted: tuple[int, int]) -> None:
    from pixart import nearest_bin

    workflow.configure(demo_graph, {"width": wanted[0], "height": wanted[1], "steps": 1})
    expected = nearest_bin(256, *wanted)
    assert picture(client, demo_graph).shape == (expected.height, expected.width, 3)


def test_crop_to_size_gives_exactly_the_wanted_size(client: ComfyClient, demo_graph: Graph) -> None:
    workflow.configure(demo_graph, {"width": 301, "height": 203, "steps": 1})
    save = node_of(demo_graph, "SaveImage")
    save["images"] = [insert(demo_graph, "PixArtCropToSize", image=save["images"], width=301, height=203), 0]
    assert picture(client, demo_graph).shape == (203, 301, 3)


@pytest.mark.parametrize("size", [(48, 72), (40, 24), (512, 128)])
def test_unusual_latent_sizes_work(client: ComfyClient, demo_graph: Graph, size: tuple[int, int]) -> None:
    """40x24 is an odd latent of 5x3."""
    latent = insert(demo_graph, "EmptyLatentImage", width=size[0], height=size[1], batch_size=1)
    node_of(demo_graph, "KSampler").update(latent_image=[latent, 0], steps=1)
    assert picture(client, demo_graph).shape == (size[1], size[0], 3)


def test_several_pictures_of_one_prompt_differ(client: ComfyClient, demo_graph: Graph) -> None:
    node_of(demo_graph, "PixArtResolution")["batch_size"] = 3
    found = pictures(client, demo_graph)
    assert len(found) == 3
    assert np.abs(found[0] - found[1]).mean() > 0.005


def test_img2img_follows_denoise(client: ComfyClient) -> None:
    graph = api("img2img", 8)
    source = input_picture("pixart-scene.png")
    distances = []
    for denoise in (0.1, 0.95):
        node_of(graph, "KSampler")["denoise"] = denoise
        distances.append(np.abs(picture(client, graph) - source).mean())
    assert distances[0] < 0.1
    assert distances[1] > 2 * distances[0]


def test_inpaint_keeps_what_is_not_masked(client: ComfyClient) -> None:
    result = picture(client, api("inpaint", 8))
    source = input_picture("pixart-inpaint.png")
    kept = source[..., 3] == 1
    kept[-120:] = False
    kept[120:136] = False  # the autoencoder sees a little across the edge of the mask
    drawn = source[..., 3] == 0
    assert np.abs(result - source[..., :3])[kept].mean() < 0.05
    assert np.abs(result - source[..., :3])[drawn].mean() > 0.05


def test_batch_draws_each_prompt_as_it_would_alone(client: ComfyClient, demo_graph: Graph) -> None:
    together = pictures(client, api("batch"))
    assert len(together) == 3
    workflow.configure(demo_graph, {"prompt": "a red circle"})
    assert np.abs(together[0] - picture(client, demo_graph)).max() < 0.05
    assert np.abs(together[0] - together[2]).mean() > 0.01


def lora(path: Path, keys: str, strength: float) -> None:
    """A rank-2 LoRA on the demo's first block: fused native keys, or PEFT's split ones."""
    with safe_open(DEMO["diffusion_models"], "pt") as file:
        width = file.get_slice("blocks.0.attn.proj.weight").get_shape()[0]
    generator = torch.Generator().manual_seed(3)
    targets = {
        "native": {"diffusion_model.blocks.0.attn.qkv": (width, 3 * width), "diffusion_model.blocks.0.mlp.fc2": (4 * width, width)},
        "peft": {f"base_model.model.transformer_blocks.0.attn1.to_{part}": (width, width) for part in "qv"},
    }  # fmt: skip
    tensors = {}
    for name, (inputs, outputs) in targets[keys].items():
        tensors[f"{name}.lora_A.weight"] = torch.randn(2, inputs, generator=generator) * strength
        tensors[f"{name}.lora_B.weight"] = torch.randn(outputs, 2, generator=generator) * strength
    save_file(tensors, path)


@pytest.mark.parametrize("keys", ["native", "peft"])
def test_lora_changes_the_picture_and_strength_zero_does_not(
    client: ComfyClient, base: Path, demo_graph: Graph, keys: str
) -> None:
    plain = picture(client, demo_graph)
    lora(base / f"models/loras/{keys}.safetensors", keys, 0.5)
    sampler = node_of(demo_graph, "KSampler")
    loader = insert(demo_graph, "LoraLoaderModelOnly", model=sampler["model"], lora_name=f"{keys}.safetensors", strength_model=1.0)
    sampler["model"] = [loader, 0]
    changed = picture(client, demo_graph)
    demo_graph[loader]["inputs"]["strength_model"] = 0.0
    same = picture(client, demo_graph)
    assert np.abs(changed - plain).mean() > 0.01
    assert np.array_equal(same, plain)


def test_interrupt_ends_the_run_and_the_next_one_works(client: ComfyClient, demo_graph: Graph) -> None:
    workflow.configure(demo_graph, {"steps": 3000, "seed": 11})
    with pytest.raises(QueueError, match="interrupted"):
        client.wait(client.queue(demo_graph), timeout=120, on_progress=lambda *_: client.post("/interrupt", {}))
    workflow.configure(demo_graph, {"steps": 2})
    assert picture(client, demo_graph).shape == (256, 256, 3)


def test_two_models_in_a_row_and_back(client: ComfyClient, demo_graph: Graph) -> None:
    loader = node_of(demo_graph, "PixArtModelLoader")
    first = picture(client, demo_graph)
    original = dict(loader)
    loader.update(model_name=SECOND_MODEL, variant="auto")
    second = picture(client, demo_graph)
    loader.update(original)
    node_of(demo_graph, "SaveImage")["filename_prefix"] = "back"
    assert np.abs(second - first).mean() > 0.01
    assert np.array_equal(picture(client, demo_graph), first)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "fp8_e4m3fn", "fp8_e5m2"])
def test_weight_dtypes_draw_nearly_the_same(client: ComfyClient, demo_graph: Graph, dtype: str) -> None:
    reference = picture(client, demo_graph)
    node_of(demo_graph, "PixArtModelLoader")["weight_dtype"] = dtype
    limit = 0.15 if dtype.startswith("fp8") else 0.05
    assert np.abs(picture(client, demo_graph) - reference).mean() < limit


def test_token_count_is_shown(client: ComfyClient, demo_graph: Graph) -> None:
    workflow.configure(demo_graph, {"prompt": "a prompt that no other test has encoded", "steps": 1})
    outputs = client.run(demo_graph)
    number = next(n for n, node in demo_graph.items() if node.get("_meta", {}).get("title") == "Prompt")
    shown = " ".join(map(str, outputs[number]["text"]))
    assert any(character.isdigit() for character in shown)


@pytest.mark.parametrize("prompt", ["", "red circle " * 5000, "éø\u6f22\u5b57 \U0001f3a8 \x07"], ids=["empty", "10,000 words", "unusual"])
def test_any_prompt_works(client: ComfyClient, demo_graph: Graph, prompt: str) -> None:
    workflow.configure(demo_graph, {"prompt": prompt, "steps": 1})
    assert picture(client, demo_graph).shape == (256, 256, 3)


def test_the_hosts_own_text_node_encodes_as_ours_and_weights_words(client: ComfyClient, demo_graph: Graph) -> None:
    ours = picture(client, demo_graph)
    sampler = node_of(demo_graph, "KSampler")
    clip = [id_of(demo_graph, "PixArtT5Loader"), 0]
    for side, text in {"positive": "a red circle above a blue square", "negative": ""}.items():
        sampler[side] = [insert(demo_graph, "CLIPTextEncode", clip=clip, text=text), 0]
    same = picture(client, demo_graph)
    demo_graph[sampler["positive"][0]]["inputs"]["text"] = "a (red:1.6) circle above a blue square"
    weighted = picture(client, demo_graph)
    assert np.abs(same - ours).max() < 0.02
    assert np.abs(weighted - same).mean() > 1e-3
