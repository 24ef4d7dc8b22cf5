"""Every workflow file against the running host's description of its nodes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from demo.workflows.family import FAMILY_WORKFLOWS
from demo.workflows.few_steps import FEW_STEPS_WORKFLOWS
from demo.workflows.guidance import GUIDANCE_WORKFLOWS
from demo.workflows.index import WORKFLOWS
from demo.workflows.kv import KV_WORKFLOWS
from tests.support.demo import ROOT

FOLDER = ROOT / "workflows"
FAMILY = (*FAMILY_WORKFLOWS, *FEW_STEPS_WORKFLOWS)  # few steps, ControlNet and the like; each has settings of its own
COMPRESSED = tuple(KV_WORKFLOWS)
STEMS = (
    "demo", "sigma-1024", "sigma-512", "sigma-2k", "alpha-1024", "alpha-512", "compiled", "img2img", "inpaint", "batch",
    *COMPRESSED, *FAMILY, *GUIDANCE_WORKFLOWS,
)  # fmt: skip
LOADERS = {
    "PixArtModelLoader": "diffusion_models", "PixArtT5Loader": "text_encoders", "VAELoader": "vae", "PixArtControlNetLoader": "controlnet",
    "PixArtHED": "controlnet", "PixArtConsistencyDecoder": "vae", "CheckpointLoaderSimple": "checkpoints",
    "PixArtLoraLoader": "loras",
}  # fmt: skip
RELEASED = tuple(stem for stem in STEMS if stem.startswith(("sigma", "alpha", "hires")))
FILE_MENUS = {
    ("PixArtModelLoader", "model_name"), ("PixArtT5Loader", "t5_name"), ("VAELoader", "vae_name"), ("LoadImage", "image"),
    ("PixArtControlNetLoader", "control_net_name"), ("PixArtHED", "hed_name"), ("PixArtConsistencyDecoder", "vae_name"),
    ("CheckpointLoaderSimple", "ckpt_name"), ("PixArtLoraLoader", "lora_name"),
}  # fmt: skip


def read(name: str) -> dict[str, Any]:
    """A file of workflows/."""
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


def specifications(info: dict[str, Any]) -> dict[str, tuple[str, dict[str, Any], bool]]:
    """Input name -> (type, options, required); menus of both API generations become COMBO with options."""
    result = {}
    for group in ("required", "optional"):
        for name, spec in info["input"].get(group, {}).items():
            options = dict(spec[1]) if len(spec) > 1 else {}
            if isinstance(spec[0], list):
                options["options"] = spec[0]
            result[name] = ("COMBO" if isinstance(spec[0], list) else spec[0], options, group == "required")
    return result


def problems(graph: dict[str, Any], object_info: dict[str, Any]) -> Iterator[str]:
    """Everything in an API graph that does not fit the host."""
    for number, node in graph.items():
        kind = node["class_type"]
        if kind not in object_info:
            yield f"{number}: no node {kind}"
            continue
        expected = specifications(object_info[kind])
        yield from (f"{number} {kind}: no input {name}" for name in node["inputs"].keys() - expected.keys())
        for name, (wanted, options, required) in expected.items():
            if name not in node["inputs"]:
                if required:
                    yield f"{number} {kind}: {name} is missing"
                continue
            given = node["inputs"][name]
            if isinstance(given, list):
                problem = link_problem(given, wanted, graph, object_info)
            else:
                problem = value_problem(given, wanted, options, (kind, name))
            if problem:
                yield f"{number} {kind}.{name}: {problem}"


def link_problem(link: list[Any], wanted: str, graph: dict[str, Any], object_info: dict[str, Any]) -> str | None:
    """Why a link can't be."""
    source = graph.get(link[0])
    if source is None:
        return f"no node {link[0]}"
    outputs = object_info[source["class_type"]]["output"]
    if link[1] >= len(outputs):
        return f"{source['class_type']} has no output {link[1]}"
    return None if outputs[link[1]] == wanted else f"{outputs[link[1]]} where {wanted} is expected"


def value_problem(value: Any, wanted: str, options: dict[str, Any], where: tuple[str, str]) -> str | None:
    """Why a value can't be; menus of files depend on the machine."""
    types = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool, "COMBO": str}
    if wanted not in types:
        return f"the value {value!r} where a link of type {wanted} is expected"
    if not isinstance(value, types[wanted]):
        return f"{value!r} is no {wanted}"
    if wanted == "COMBO" and where not in FILE_MENUS and value not in options["options"]:
        return f"{value!r} is not in the menu"
    if wanted in ("INT", "FLOAT") and not options.get("min", value) <= value <= options.get("max", value):
        return f"{value} is out of range"
    return None


def test_the_expected_workflows_are_there_in_both_formats() -> None:
    for folder in (FOLDER, FOLDER / "api"):
        assert {path.stem for path in folder.glob("*.json")} == set(STEMS)


@pytest.mark.parametrize("stem", STEMS)
def test_api_graph_fits_the_host(stem: str, object_info: dict[str, Any]) -> None:
    assert list(problems(read(f"api/{stem}.json"), object_info)) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cfg": 1000.0}, "out of range"),
        ({"scheduler": "none"}, "not in the menu"),
        ({"steps": "20"}, "is no INT"),
        ({"model": ["2", 0]}, "CLIP where MODEL"),
        ({"extra": 1}, "no input extra"),
    ],
)
def test_the_check_sees_mistakes(change: dict[str, Any], message: str, object_info: dict[str, Any]) -> None:
    graph = read("api/demo.json")
    next(node for node in graph.values() if node["class_type"] == "KSampler")["inputs"].update(change)
    assert any(message in problem for problem in problems(graph, object_info))


@pytest.mark.parametrize("stem", STEMS)
def test_files_are_what_demo_workflows_writes(stem: str) -> None:
    assert read(f"api/{stem}.json") == WORKFLOWS[stem]().graph, "run python -m demo.workflows.index"


@pytest.mark.parametrize("stem", STEMS)
def test_ui_and_api_show_the_same_graph(stem: str) -> None:
    graph, ui = read(f"api/{stem}.json"), read(f"{stem}.json")
    nodes = {str(node["id"]): node for node in ui["nodes"] if node["type"] != "Note"}
    assert {number: node["type"] for number, node in nodes.items()} == {number: node["class_type"] for number, node in graph.items()}
    links = {link[0]: link for link in ui["links"]}
    for number, node in graph.items():
        linked = {slot["name"]: links[slot["link"]] for slot in nodes[number]["inputs"] if slot["link"] is not None}
        expected = {name: value for name, value in node["inputs"].items() if isinstance(value, list)}
        assert {name: [str(link[1]), link[2]] for name, link in linked.items()} == expected
        for value in node["inputs"].values():
            assert isinstance(value, list) or value in nodes[number]["widgets_values"]


@pytest.mark.parametrize("stem", STEMS)
def test_a_note_says_where_every_file_comes_from_and_belongs(stem: str) -> None:
    ui = read(f"{stem}.json")
    note = next(node for node in ui["nodes"] if node["type"] == "Note")["widgets_values"][0]
    for node in ui["nodes"]:
        if node["type"] in LOADERS:
            assert node["widgets_values"][0] in note
            parent = "demo/weights" if "demo" in node["widgets_values"][0] else "models"
            assert f"{parent}/{LOADERS[node['type']]}" in note


@pytest.mark.parametrize("stem", RELEASED)
def test_loaders_offer_the_download(stem: str) -> None:
    for node in read(f"{stem}.json")["nodes"]:
        if node["type"] not in LOADERS:
            continue
        (model,) = node["properties"]["models"]
        assert model["name"] == node["widgets_values"][0]
        assert model["directory"] == LOADERS[node["type"]]
        assert model["url"].startswith("https://huggingface.co/")
        assert model["url"].endswith(model["name"])


@pytest.mark.parametrize("stem", [stem for stem in RELEASED if stem not in COMPRESSED])
def test_released_models_use_their_own_size_tokens_and_vae(stem: str) -> None:
    from pixart.config import get_variant

    variant = get_variant(stem)
    graph = read(f"api/{stem}.json")
    inputs = {node["class_type"]: node["inputs"] for node in graph.values()}
    assert inputs["PixArtModelLoader"]["variant"] == variant.name
    assert inputs["PixArtModelLoader"]["model_name"] in variant.files
    assert inputs["PixArtResolution"]["base"] == str(variant.base_size)
    assert inputs["PixArtTextEncode"]["max_tokens"] == str(variant.max_tokens)
    assert ("sdxl" in inputs["VAELoader"]["vae_name"]) == (variant.vae == "sdxl")


def of_kind(graph: dict[str, Any], kind: str) -> dict[str, dict[str, Any]]:
    """Ids and inputs of the nodes of a class."""
    return {number: node["inputs"] for number, node in graph.items() if node["class_type"] == kind}


@pytest.mark.parametrize("stem", COMPRESSED)
def test_compressed_workflows_draw_with_the_2k_weights(stem: str) -> None:
    """Patches follow each other from the 2K model to the sampler of the large picture, on blocks of their own; decoding is tiled."""
    from pixart.config import get_variant
    from pixart.kv_compress import KVCompression, check_together

    graph = read(f"api/{stem}.json")
    patches, variant = of_kind(graph, "PixArtKVCompress"), get_variant("sigma-2k")
    (latent,) = of_kind(graph, "PixArtResolution").values()
    (sampler,) = [s for s in of_kind(graph, "KSampler").values() if s["model"][0] in patches]
    (decode,) = of_kind(graph, "VAEDecodeTiled").values()
    assert graph[decode["samples"][0]]["inputs"] == sampler
    found, number = [], sampler["model"][0]
    while number in patches:
        values = dict(patches[number])
        number = values.pop("model")[0]
        found.append(KVCompression(**values))
    check_together(found, variant.transformer)
    assert all(one.end_percent > 1 - sampler["denoise"] for one in found)  # each has steps to hold in
    assert len(found) == len(patches)
    assert graph[number]["inputs"]["variant"] == "sigma-2k" and graph[number]["inputs"]["model_name"] in variant.files
    if stem.startswith("sigma"):
        assert stem == {"2048": "sigma-2k-kv"}.get(latent["base"], f"sigma-{latent['base']}-kv")
        assert latent["width"] == latent["height"] == int(latent["base"]) and sampler["denoise"] == 1.0


@pytest.mark.parametrize("stem", ["hires-2k", "hires-4096"])
def test_hires_fix_draws_again_from_a_part_of_the_noise(stem: str) -> None:
    graph = read(f"api/{stem}.json")
    (latent,), (scale,) = of_kind(graph, "PixArtResolution").values(), of_kind(graph, "ImageScaleBy").values()
    assert latent["base"] == "1024" and 1024 * scale["scale_by"] == (2048 if stem == "hires-2k" else 4096)
    (encode,) = of_kind(graph, "VAEEncodeTiled")
    first, second = sorted(of_kind(graph, "KSampler").values(), key=lambda s: -s["denoise"])
    assert first["denoise"] == 1.0 and graph[first["model"][0]]["inputs"]["variant"] == "sigma-1024"
    assert 0 < second["denoise"] < 1 and second["latent_image"] == [encode, 0]


def test_the_compiled_workflow_is_sigma_1024_with_the_node_before_the_sampler() -> None:
    graph, plain = read("api/compiled.json"), read("api/sigma-1024.json")
    ((number, inputs),) = of_kind(graph, "TorchCompileModel").items()
    (sampler,) = of_kind(graph, "KSampler").values()
    assert sampler["model"] == [number, 0] and inputs["backend"] == "inductor"
    assert graph[inputs["model"][0]]["inputs"] == plain["1"]["inputs"]
    assert sorted(node["class_type"] for node in graph.values() if node != graph[number]) == sorted(n["class_type"] for n in plain.values())


@pytest.mark.parametrize("stem", [stem for stem in STEMS if stem not in FAMILY])
def test_sampling_defaults(stem: str) -> None:
    for node in read(f"api/{stem}.json").values():
        if node["class_type"] == "KSampler":
            chosen = {name: node["inputs"][name] for name in ("sampler_name", "scheduler", "steps", "cfg")}
            assert chosen == {"sampler_name": "dpmpp_2m", "scheduler": "sgm_uniform", "steps": 20, "cfg": 4.5}


@pytest.mark.parametrize("stem", STEMS)
def test_every_workflow_has_its_picture(stem: str) -> None:
    """The host's template browser shows workflows/<stem>.jpg."""
    picture = FOLDER / f"{stem}.jpg"
    assert picture.read_bytes()[:2] == b"\xff\xd8"
    assert picture.stat().st_size < 300_000


@pytest.mark.parametrize(
    ("stem", "kind", "expected"),
    [
        ("lcm", "KSampler", {"steps": 4, "cfg": 1.0, "sampler_name": "lcm", "scheduler": "simple"}),
        ("lcm", "ModelSamplingDiscrete", {"sampling": "lcm", "zsnr": False}),
        ("dmd", "PixArtOneStep", {"timestep": 400}),
        ("dmd", "SamplerCustom", {"cfg": 1.0, "add_noise": True}),
        ("lcm-demo", "KSampler", {"steps": 4, "cfg": 1.0, "sampler_name": "lcm", "scheduler": "simple"}),
        ("lcm-demo", "PixArtLoraLoader", {"lora_name": "pixart-demo-lcm.safetensors", "strength": 1.0}),
        ("dmd-demo", "PixArtOneStep", {"timestep": 400}),
        ("dmd-demo", "PixArtLoraLoader", {"lora_name": "pixart-demo-dmd.safetensors", "strength": 1.0}),
        ("optimized", "PixArtTimesteps", {"schedule": "optimized", "steps": 10}),
        ("optimized", "KSamplerSelect", {"sampler_name": "dpmpp_2m"}),
        ("optimized", "SamplerCustom", {"cfg": 4.5, "add_noise": True}),
        ("sa-solver", "SamplerSASolver", {"predictor_order": 2, "corrector_order": 2, "eta": 1.0, "simple_order_2": True}),
        ("sa-solver", "BasicScheduler", {"steps": 25, "scheduler": "sgm_uniform", "denoise": 1.0}),
        ("sa-solver", "SamplerCustom", {"cfg": 3.0}),
        ("controlnet", "ControlNetApplyAdvanced", {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}),
    ],
)
def test_settings_of_the_family(stem: str, kind: str, expected: dict[str, Any]) -> None:
    (inputs,) = (node["inputs"] for node in read(f"api/{stem}.json").values() if node["class_type"] == kind)
    assert expected.items() <= inputs.items()


def test_two_stages_meet_at_the_same_step() -> None:
    first, second = (node["inputs"] for node in read("api/900m-two-stage.json").values() if node["class_type"] == "KSamplerAdvanced")
    assert first["end_at_step"] == second["start_at_step"] == 12 and first["steps"] == second["steps"] == 20
    assert (first["add_noise"], second["add_noise"]) == ("enable", "disable")
    assert (first["return_with_leftover_noise"], second["return_with_leftover_noise"]) == ("enable", "disable")
