"""The family's workflows through the real queue, those that the demo's models can drive, and what they refuse."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy import ndimage

from demo import DISTILLED
from demo.data.reader import check, read_picture
from demo.evaluation.control import overlap
from demo.evaluation.prompts import Run, make_questions
from launch import graph as workflow
from launch.client import ComfyClient, Graph, QueueError
from pixart.config import get_variant
from pixart.controlnet import ControlNetConfig, PixArtControlNet
from tests.support.demo import DEMO, ROOT, SECOND_MODEL
from tests.support.graphs import id_of, insert, node_of, picture, pictures
from tests.support.tiny_consistency import write_decoder

RED, BLACK = "a red circle on a white background", "a yellow cross on a black background"


def api(stem: str) -> Graph:
    """A workflow as shipped."""
    return workflow.load(ROOT / f"workflows/api/{stem}.json")


def on_demo(graph: Graph) -> Graph:
    """A graph of released models with the demo's in their place."""
    values = {
        "PixArtModelLoader": {"model_name": DEMO["diffusion_models"].name, "variant": "auto"},
        "PixArtT5Loader": {"t5_name": DEMO["text_encoders"].name},
        "VAELoader": {"vae_name": DEMO["vae"].name},
        "PixArtResolution": {"base": "256", "width": 256, "height": 256},
    }
    for node in graph.values():
        node["inputs"].update(values.get(node["class_type"], {}))
    return graph


def save_controlnet(base: Path, name: str, **sizes: int) -> str:
    """A random ControlNet of the demo's width among the host's models."""
    demo = get_variant("demo").transformer
    config = {"hidden_size": demo.hidden_size, "depth": 2, "num_heads": demo.num_heads, "mlp_hidden": demo.mlp_hidden, **sizes}
    model = PixArtControlNet(ControlNetConfig(**config))
    generator = torch.Generator().manual_seed(0)
    folder = base / "models/controlnet"
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: torch.randn(v.shape, generator=generator) * 0.05 for k, v in model.state_dict().items()}, folder / name)
    return name


def test_sa_solver_draws_what_the_prompt_says(client: ComfyClient, demo_graph: Graph) -> None:
    drawn, others = api("sa-solver"), {}
    for prompt in (RED, BLACK):
        workflow.configure(demo_graph, {"prompt": prompt, "steps": 12})
        others[prompt] = picture(client, demo_graph)
    workflow.configure(drawn, {"prompt": RED})
    node_of(drawn, "BasicScheduler")["steps"] = 12
    found = picture(client, drawn)
    assert np.abs(found - others[RED]).mean() < np.abs(found - others[BLACK]).mean()


def test_a_controlnet_changes_the_picture_as_strong_as_it_is_set(client: ComfyClient, base: Path) -> None:
    graph = api("controlnet-demo")
    node_of(graph, "KSampler")["steps"] = 3
    node_of(graph, "PixArtControlNetLoader")["control_net_name"] = save_controlnet(base, "random.safetensors")
    found = {}
    for strength in (0.0, 0.02, 1.0):
        node_of(graph, "ControlNetApplyAdvanced")["strength"] = strength
        found[strength] = picture(client, graph)
    weak, strong = (np.abs(found[strength] - found[0.0]).mean() for strength in (0.02, 1.0))
    assert 0.001 < weak < strong


def test_the_demos_controlnet_draws_the_outlines_of_the_picture(client: ComfyClient) -> None:
    """What isn't background overlaps with the picture's objects: far better with the ControlNet than without."""
    graph = api("controlnet-demo")
    node_of(graph, "KSampler")["steps"] = 12
    wanted = np.asarray(Image.open(ROOT / "demo/inputs/pixart-scene.png").convert("RGB")) / 255
    found = {}
    for strength in (0.0, 1.0):
        node_of(graph, "ControlNetApplyAdvanced")["strength"] = strength
        found[strength] = []
        for seed in (1, 2, 3):
            node_of(graph, "KSampler")["seed"] = seed
            found[strength].append(overlap(picture(client, graph), wanted))
    assert np.mean(found[1.0]) > max(0.7, np.mean(found[0.0]) + 0.15), found


@pytest.mark.parametrize(
    ("sizes", "message"), [({"hidden_size": 144, "num_heads": 2}, "144 wide, the model 216"), ({"depth": 8}, "at most 7")]
)
def test_a_controlnet_of_another_model_stops_with_both_numbers(client: ComfyClient, base: Path, sizes: dict, message: str) -> None:
    graph = api("controlnet-demo")
    node_of(graph, "PixArtControlNetLoader")["control_net_name"] = save_controlnet(base, f"other-{len(message)}.safetensors", **sizes)
    with pytest.raises(QueueError, match=message):
        client.run(graph)


def test_the_second_stage_finishes_what_the_first_began(client: ComfyClient) -> None:
    graph = on_demo(api("900m-two-stage"))
    next(node for node in graph.values() if node["_meta"]["title"] == "Prompt")["inputs"]["text"] = RED
    one = picture(client, graph)
    assert {found.color for found in read_picture(one).objects} == {"red"}
    stages = [node["inputs"] for node in graph.values() if node["class_type"] == "PixArtModelLoader"]
    stages[1]["model_name"] = SECOND_MODEL
    assert np.abs(picture(client, graph) - one).mean() > 0.01


def test_inpainting_at_full_size_keeps_what_is_not_masked(client: ComfyClient) -> None:
    """The mask goes through cropping too."""
    result = picture(client, on_demo(api("inpaint-sigma-1024")))
    source = np.asarray(Image.open(ROOT / "demo/inputs/pixart-inpaint.png").convert("RGBA"), np.float32) / 255
    masked = source[..., 3] == 0
    far = ~ndimage.binary_dilation(masked, iterations=24)  # the autoencoder sees a little across the mask's edge
    change = np.abs(result - source[..., :3])
    assert change[far].mean() < 0.05 < change[masked].mean()


def test_one_step_is_one_forward(client: ComfyClient) -> None:
    steps: list[tuple[int, int]] = []
    client.wait(client.queue(on_demo(api("dmd"))), on_progress=lambda node, done, total: steps.append((done, total)))
    assert (1, 1) in steps and max(total for _, total in steps) == 1


def steps_and_picture(client: ComfyClient, graph: Graph) -> tuple[list[tuple[int, int]], np.ndarray]:
    """(done, total) of each progress message, and the picture."""
    steps: list[tuple[int, int]] = []
    entry = client.wait(client.queue(graph), on_progress=lambda node, done, total: steps.append((done, total)))
    saved = entry["outputs"][id_of(graph, "SaveImage")]["images"][0]
    return steps, np.asarray(Image.open(io.BytesIO(client.image(saved))).convert("RGB"), np.float32) / 255


def test_lcm_takes_four_steps_to_what_the_prompt_says(client: ComfyClient, demo_graph: Graph) -> None:
    """The demo wasn't distilled: its colours are there after four steps, not always its shapes."""
    wanted = {}
    for prompt in (RED, BLACK):
        workflow.configure(demo_graph, {"prompt": prompt, "steps": 12})
        wanted[prompt] = picture(client, demo_graph)
    for prompt, other in ((RED, BLACK), (BLACK, RED)):
        graph = on_demo(api("lcm"))
        workflow.configure(graph, {"prompt": prompt})
        steps, found = steps_and_picture(client, graph)
        assert {total for _, total in steps} == {4} and (4, 4) in steps
        assert np.abs(found - wanted[prompt]).mean() < 0.5 * np.abs(found - wanted[other]).mean()


@pytest.mark.parametrize(("kind", "count", "least"), [("lcm", 4, 0.8), ("dmd", 1, 0.6), ("optimized", 10, 0.8)])
def test_the_demo_draws_what_is_asked_in_so_few_steps(client: ComfyClient, kind: str, count: int, least: float) -> None:
    """Held-out prompts, each in a picture of its own, read by the checker."""
    if kind in DISTILLED and not DISTILLED[kind].is_file():
        pytest.skip(f"{DISTILLED[kind].name} isn't there yet; a recipe of configs/train makes it")
    questions = [question for objects in (1, 2) for question in make_questions(Run("heldout", 3), objects, 3)]
    right, totals = [], set()
    for question in questions:
        graph = api(f"{kind}-demo") if kind in DISTILLED else on_demo(api(kind))
        workflow.configure(graph, {"prompt": question.caption.text})
        steps, found = steps_and_picture(client, graph)
        totals |= {total for _, total in steps}  # one step can be over before the client listens
        right.append(check(question.scene, found, question.caption.stated).correct)
    assert totals == {count} and np.mean(right) >= least, right


def test_the_consistency_decoder_draws_from_the_queue(client: ComfyClient, base: Path) -> None:
    """A random decoder: the picture is not to be recognised, but has its size, and is another for another latent."""
    write_decoder(base / "models/vae/consistency-decoder")
    graph, found = on_demo(api("consistency-decoder")), {}
    workflow.configure(graph, {"steps": 1})
    for seed in (1, 2):
        workflow.configure(graph, {"seed": seed})
        found[seed] = picture(client, graph)
    assert found[1].shape == (256, 256, 3) and found[1].std() > 0.01
    assert np.abs(found[1] - found[2]).mean() > 0.001


def test_a_second_pass_in_tiles_keeps_the_picture_and_redraws_it(client: ComfyClient) -> None:
    """hires-2k with the demo: 256 to 512 pixels, encoded and decoded in tiles of 256."""
    graph = on_demo(api("hires-2k"))
    workflow.configure(graph, {"prompt": RED, "steps": 12})
    next(node for node in graph.values() if node["_meta"]["title"] == "Second pass")["inputs"] |= {"steps": 4, "denoise": 0.3}
    node_of(graph, "PixArtKVCompress").update(first_block=4, last_block=-1)
    for kind in ("VAEEncodeTiled", "VAEDecodeTiled"):
        node_of(graph, kind).update(tile_size=256, overlap=64)
    first, second = pictures(client, graph)
    assert first.shape == (256, 256, 3) and second.shape == (512, 512, 3)
    assert {found.color for found in read_picture(first).objects} == {"red"} == {found.color for found in read_picture(second).objects}
    change = np.abs(second.reshape(256, 2, 256, 2, 3).mean((1, 3)) - first).mean()
    assert 0.002 < change < 0.05


def test_timesteps_out_of_order_are_named(client: ComfyClient) -> None:
    graph = api("sa-solver")
    model = node_of(graph, "SamplerCustom")["model"]
    node_of(graph, "SamplerCustom")["sigmas"] = [insert(graph, "PixArtTimesteps", model=model, timesteps="100, 900"), 0]
    with pytest.raises(QueueError, match="900 after 100"):
        client.run(graph)
