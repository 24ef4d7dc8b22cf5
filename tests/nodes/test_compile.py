"""TorchCompileModel compiles once: for all steps, sizes, prompts and batches, with all that the pack adds to a model."""
from __future__ import annotations

from types import SimpleNamespace

import comfy.ldm.modules.attention as host_attention
import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from tests.nodes.test_controlnet import applied, control  # noqa: F401 - a fixture
from tests.nodes.test_kv_compress import patch
from tests.nodes.test_steps import NO_KERNELS, native_weights, perturbed
from tests.support import host
from tests.support.compiled import behind_node, breaks, compiled, counting
from tests.support.host_models import captions, difference, load_model, sample, write_model

any_size = host.pack_module("nodes.host.compiled").any_size
pytestmark = NO_KERNELS
# Latents, square ones and others, and tokens of the prompt; grids that R = 2 divides, as those of all bins
RUNS = [((8, 8), 5), ((8, 12), 7), ((16, 8), 30)]


@pytest.fixture(autouse=True)
def attention_of_gpus(monkeypatch) -> None:
    """The host's default for CPUs asks for the free memory in every call, which no graph can hold."""
    monkeypatch.setattr(host_attention, "optimized_attention", host_attention.attention_pytorch)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory):
    """Of two blocks: every further one takes as long to trace."""
    return write_model(tmp_path_factory.mktemp("compile"), depth=2)


@pytest.fixture(scope="module")
def under_control(tmp_path_factory: pytest.TempPathFactory):
    """A block more than the ControlNet has."""
    return write_model(tmp_path_factory.mktemp("compile-control"), depth=3)


def lora(model, strength: float = 1.0):
    """Two matrices patched, as a LoRA does it."""
    patched = model.clone()
    patched.add_patches({name: (torch.full_like(value, 0.02),) for name, value in native_weights(model)}, strength)
    return patched


def drawn(model, run, control=None, steps: int = 3) -> torch.Tensor:  # noqa: F811
    (rows, columns), tokens = run
    prompts = captions(tokens, seed=tokens), captions(1, seed=1)
    if control is not None:
        prompts = applied(control, positive=prompts[0], negative=prompts[1])
    return sample(model, *prompts, torch.zeros(1, 4, rows, columns), steps=steps)


# change of MODEL, whether under a ControlNet, graphs: another one for compressed steps beside others, and for PAG's prediction
CASES = {
    "compressed in the first half, the node's default": (lambda model: patch(model, end_percent=0.5), False, 2),
    "all of them": (lambda model: perturbed(patch(lora(model))), True, 2),
}


@pytest.mark.parametrize("case", CASES)
def test_no_step_or_size_compiles_anew(model_file, under_control, control, case: str) -> None:  # noqa: F811
    change, controlled, expected = CASES[case]
    model, graphs = change(load_model(under_control if controlled else model_file)), []
    fast, hint = compiled(model, graphs), control if controlled else None
    for run in RUNS:
        assert difference(drawn(fast, run, hint), drawn(model, run, hint)) < 1e-5
        assert len(graphs) == expected and not breaks(), run
    if controlled:
        assert difference(drawn(fast, RUNS[1], hint), drawn(model, RUNS[1])) > 1e-4


def test_a_batch_of_pictures_shares_the_graph(model_file) -> None:
    """Without a one-token prompt, whose place among the rows is a number of the graph. aot_eager: what inductor does before kernels."""
    model, graphs = load_model(model_file), []
    fast = compiled(model, graphs, aot_eager)
    for count in (1, 3):
        given = captions(5), captions(3, seed=1), torch.zeros(count, 4, 8, 12)
        assert difference(sample(fast, *given, steps=2), sample(model, *given, steps=2)) < 1e-5
    assert len(graphs) == 1


def test_another_strength_of_a_lora_compiles_nothing(model_file) -> None:
    """The host runs the node again, behind the changed LoRA; weights are inputs of the graph."""
    model, graphs = load_model(model_file), []
    compiled(model)
    backend, seen = counting(graphs), []
    for strength in (0.5, 1.0):
        patched = lora(model, strength)
        seen.append(drawn(behind_node(patched, backend), RUNS[1]))
        assert difference(seen[-1], drawn(patched, RUNS[1])) < 1e-5
    assert len(graphs) == 1 and difference(seen[0], seen[1]) > 1e-4


@pytest.mark.parametrize(
    ("settings", "marked"),
    [({"backend": "inductor"}, True), ({"backend": "cudagraphs"}, False), ({"dynamic": False}, False), ({"dynamic": True}, False), (None, True)],
)
def test_sizes_are_left_to_those_who_chose(settings, marked: bool) -> None:
    network = torch.compile(torch.nn.Identity(), backend="eager")
    with any_size(network, {} if settings is None else {"torch_compile_kwargs": settings}):
        assert bool(network._forward_pre_hooks) == marked
    assert not network._forward_pre_hooks
    plain = SimpleNamespace()
    with any_size(plain, {}):
        assert not vars(plain)
