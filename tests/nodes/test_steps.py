"""A step through the host: one graph for TorchCompileModel, compressed or not, and nothing in it that waits for the GPU."""
from __future__ import annotations

import comfy.ldm.modules.attention as host_attention
import pytest
import torch

import nodes as host_nodes
from tests.nodes.test_kv_compress import patch
from tests.support import host
from tests.support.compiled import breaks, compiled
from tests.support.devices import OnlyOn
from tests.support.host_models import captions, difference, load_model, noise, sample, to_device, write_model
from tests.support.kv_reference import write_compressed

model_module = host.pack_module("pixart.model")
kv_module = host.pack_module("nodes.host.kv_compress")
PAG = host.pack_module("nodes.guidance").PixArtPAG
NO_KERNELS = pytest.mark.skipif(host.on_pretended_card(), reason="torch.compile doesn't know the pretended card")


@pytest.fixture(autouse=True)
def attention_of_gpus(monkeypatch) -> None:
    """The host's default for CPUs asks for the free memory in every call, which no graph can hold."""
    monkeypatch.setattr(host_attention, "optimized_attention", host_attention.attention_pytorch)


@pytest.fixture(scope="module")
def sigma_file(tmp_path_factory: pytest.TempPathFactory):
    """Of two blocks: every further one takes as long to trace."""
    return write_model(tmp_path_factory.mktemp("two-blocks"), depth=2)


@pytest.fixture(scope="module")
def one_block(tmp_path_factory: pytest.TempPathFactory):
    return load_model(write_model(tmp_path_factory.mktemp("one-block"), depth=1))


def run(model, steps: int, seed: int = 0):
    return sample(model, captions(5, seed), captions(2, seed + 1), steps=steps)


def two_ratios(model):
    return patch(patch(model, end_percent=0.4), ratio=3, start_percent=0.4, first_block=1)


def lora(model):
    """Two matrices patched, as a LoRA does it."""
    patched = model.clone()
    weights = {name: (torch.full_like(value, 0.02),) for name, value in native_weights(model)}
    assert len(patched.add_patches(weights)) == 2
    return patched


def native_weights(model):
    names = ("diffusion_model.blocks.0.attn.qkv.weight", "diffusion_model.blocks.1.mlp.fc1.weight")
    return [(name, model.model_state_dict()[name]) for name in names]


def perturbed(model, kind: str = "perturbed attention", **changes):
    last = str(model.model.diffusion_model.depth - 1)
    return PAG.execute(model, kind, **{"blocks": last, "scale": 3.0, "start_percent": 0.0, "end_percent": 1.0, **changes}).result[0]


ALL = "compressed in a part, perturbed, LoRA"
IN_SECOND_BLOCK = ("two ratios in two parts", ALL)
# change of MODEL, graphs; test_compile.py has compression in the first half, and a LoRA alone
CASES = {
    "compressed in the middle of sampling": (lambda model: patch(model, start_percent=0.2, end_percent=0.7), 2),
    "two ratios in two parts": (two_ratios, 2),
    "perturbed attention in a part of sampling": (lambda model: perturbed(model, end_percent=0.5), 2),
    "skipped blocks": (lambda model: perturbed(model, "skipped blocks"), 2),
    ALL: (lambda model: perturbed(patch(lora(model), end_percent=0.5)), 4),
}


@NO_KERNELS
@pytest.mark.parametrize(("case", "cfg"), [*((case, 4.5) for case in CASES), ("perturbed attention in a part of sampling", 1.0)])
def test_compiled_steps_equal_eager_ones_and_share_their_graphs(sigma, one_block, case: str, cfg: float) -> None:
    """Newer hosts drop guards on transformer_options: what changes there would be frozen as it was in the first step.

    At cfg 4.5 both prompts are one batch; at 1 there is one prompt.
    """
    change, count = CASES[case]
    plain = sigma if case in IN_SECOND_BLOCK else one_block
    model, graphs = change(plain), []
    fast, prompts = compiled(model, graphs), (captions(5), captions(2, 1))
    found, wanted = (sample(each, *prompts, steps=6, cfg=cfg) for each in (fast, model))
    assert difference(found, wanted) < 1e-6
    assert len(graphs) == count and not breaks()
    assert difference(found, sample(plain, *prompts, steps=6, cfg=cfg)) > 1e-5  # late steps change little of a random model's latent
    sample(fast, captions(5, 2), captions(2, 3), steps=9, cfg=cfg)
    assert len(graphs) == count


@NO_KERNELS
def test_compiled_guidance_where_prompts_share_no_batch(one_block) -> None:
    """Both predictions and the weakened one are then of the same shapes."""
    area = host_nodes.ConditioningSetArea().append(captions(2, seed=1), 32, 64, 0, 0, 1.0)[0]
    model = perturbed(one_block)
    found, wanted = (sample(each, captions(5), area, steps=4) for each in (compiled(model), model))
    assert difference(found, wanted) < 1e-5


@NO_KERNELS
def test_an_empty_prompt_is_spared_in_the_graph_too(sigma) -> None:
    """And one graph serves every length of prompts."""
    graphs = []
    fast = compiled(sigma, graphs)
    for length in (5, 9, 7, 20):
        given = captions(length), captions(1, seed=1)
        assert difference(sample(fast, *given, steps=2), sample(sigma, *given, steps=2)) < 1e-5
    assert len(graphs) == 1
    for graph in graphs:
        products = [node for node in graph.graph.nodes if "cross_attn_modules_q_linear" in str(node.args) and node.op == "call_function"]
        assert len(products) == 2 and all(node.meta["example_value"].shape[0] == 1 for node in products)


@NO_KERNELS
def test_a_compressed_file_is_one_graph(tmp_path) -> None:
    path, _ = write_compressed("safetensors", tmp_path, {0: 3, 2: 2}, "conv", depth=3, captions=32, null_rows=None)
    model, graphs = load_model(path), []
    assert difference(run(compiled(model, graphs), 3), run(model, 3)) < 1e-5
    assert len(graphs) == 1


@pytest.mark.parametrize("micro", [False, True])
@pytest.mark.parametrize("compress", ["no", "always", "default"])
def test_no_step_waits_for_the_device(tmp_path, micro: bool, compress: str, monkeypatch) -> None:
    """apply_model with its wrappers, on a device without values; the conditioning as `extra_conds` makes it for that device.

    Compression in a part of sampling looks at the noise level once.
    """
    looks = []
    monkeypatch.setattr(kv_module, "float", lambda value: looks.append(value.device.type) or 999.0, raising=False)
    sizes = {"micro": True, "null_rows": 120, "hidden": 144} if micro else {}
    patcher = load_model(write_model(tmp_path, depth=2, **sizes))
    patcher = {"no": lambda model: model, "always": patch, "default": lambda model: patch(model, end_percent=0.5)}[compress](patcher)
    model = patcher.model.to("meta")
    latent, sigma = torch.empty(1, 4, 9, 14, device="meta"), torch.empty(2, device="meta")
    given = ((captions(5)[0][0], None), (captions(3)[0][0], torch.tensor([[1, 1, 0]])))
    conds = [
        model.extra_conds(noise=latent, device=torch.device("meta"), cross_attn=states, attention_mask=mask, width=112, height=72)
        for states, mask in given
    ]
    processed = [{name: cond.process_cond(batch_size=1, area=None) for name, cond in row.items()} for row in conds]
    assert all(first.can_concat(processed[1][name]) for name, first in processed[0].items())
    joined = {name: first.concat([processed[1][name]]) for name, first in processed[0].items()}
    options = {**patcher.model_options["transformer_options"], "wrappers": patcher.wrappers}  # as the host's sampler joins them
    with torch.no_grad(), OnlyOn("meta"):
        out = model.apply_model(latent.expand(2, -1, -1, -1), sigma, transformer_options=options, **joined)
    assert out.shape == (2, 4, 9, 14) and looks == (["meta"] if compress == "default" else [])


def test_positions_are_made_once_a_run_for_each_prompt(sigma, monkeypatch) -> None:
    made, calls = model_module.axis_positions, []
    monkeypatch.setattr(model_module, "axis_positions", lambda *args: (calls.append(args), made(*args))[1])
    run(sigma, 5)
    assert len(calls) == 2


def test_areas_have_positions_of_their_own_size(sigma, monkeypatch) -> None:
    """The conditioning of an area holds the positions of the whole latent, which don't fit."""
    import nodes as host_nodes

    area = host_nodes.ConditioningSetArea().append(captions(4, seed=3), 32, 64, 0, 0, 1.0)[0]
    latent = torch.zeros(1, 4, 8, 12)
    found = sample(sigma, captions(5) + area, captions(2, seed=1), latent)
    monkeypatch.setattr(type(sigma.model.diffusion_model), "fitting", lambda self, positions, x: None)  # made anew each time
    assert torch.equal(found, sample(sigma, captions(5) + area, captions(2, seed=1), latent))


def test_positions_stay_exact_in_bf16(sigma_file, monkeypatch) -> None:
    """The host casts tensors of the conditioning to the model's dtype; in bf16 positions would be wrong by up to 0.2."""
    model = load_model(sigma_file, weight_dtype="bf16")
    model.set_model_compute_dtype(torch.bfloat16)
    network, seen = model.model.diffusion_model, []
    fitting = network.fitting
    monkeypatch.setattr(network, "fitting", lambda positions, x: (seen.append(fitting(positions, x)), seen[-1])[1])
    run(model, 2)
    for rows, columns in seen:
        assert rows.dtype == columns.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(seen[0], network.positions_of(to_device(model, noise()))))
