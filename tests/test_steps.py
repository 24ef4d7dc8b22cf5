"""What a step of sampling may not do: break torch.compile's graph, compile anew, make the GPU wait, repeat what no step changes."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pixart import embeddings
from pixart.attention import OneToken
from pixart.config import TransformerConfig
from pixart.errors import InputError
from pixart.kv_compress import KVCompression
from pixart.model import PixArtTransformer
from pixart.sampling import denoise, make_scheduler
from pixart.text.encoder import TextEmbeddings
from tests.support.devices import OnlyOn

CONFIG = TransformerConfig(hidden_size=72, depth=2, num_heads=1, mlp_hidden=288, caption_channels=32, null_caption=False)
TRAINED = replace(CONFIG, compressed_blocks=((1, 2),))
MICRO = replace(CONFIG, micro_condition=True)
MERGED = KVCompression(2, last_block=0, end_percent=1.0)
CASES = {
    "plain": (CONFIG, (), 1),
    "size": (MICRO, (), 1),
    "trained compression": (TRAINED, (), 1),
    "patched in all steps": (CONFIG, (MERGED,), 1),
    "patched in a part": (CONFIG, (replace(MERGED, end_percent=0.5),), 2),
    "patched in two parts": (CONFIG, (replace(MERGED, end_percent=0.6), KVCompression(3, "stride", 1, start_percent=0.3, end_percent=1.0, min_tokens=9)), 3),
    "another ratio later": (CONFIG, (replace(MERGED, end_percent=0.5), KVCompression(3, start_percent=0.5, end_percent=1.0, key_scale=1.2)), 2),
}


def random_model(config: TransformerConfig) -> PixArtTransformer:
    """Every tensor random, so that no path is dead."""
    model = PixArtTransformer(config)
    generator = torch.Generator().manual_seed(0)
    model.load_state_dict({k: torch.randn(v.shape, generator=generator) * 0.1 for k, v in model.state_dict().items()})
    return model.eval().requires_grad_(False)


def text(*lengths: int) -> TextEmbeddings:
    states = torch.randn(len(lengths), max(lengths), 32, generator=torch.Generator().manual_seed(1))
    return TextEmbeddings(states, torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None])


def draw(model, compression, steps, seed=0, lengths=(1, 5)):
    noise = torch.randn(len(lengths) // 2, 4, 10, 14, generator=torch.Generator().manual_seed(seed))
    size = torch.tensor([[80, 112]]) if model.config.micro_condition else None
    return denoise(model, noise, text(*lengths), make_scheduler(), steps=steps, guidance=4.5, size=size, kv_compression=compression)


@pytest.mark.parametrize("case", CASES)
def test_one_graph_for_all_steps(case):
    """fullgraph raises where the graph would break; the backend counts. Compression in parts of sampling: one graph a part."""
    config, compression, expected = CASES[case]
    model, graphs = random_model(config), []

    def backend(graph, inputs):
        assert not any(isinstance(given, torch.SymInt) for given in inputs)  # a ratio as a symbol would make slow kernels
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        found = draw(compiled, compression, steps=6)
        assert len(graphs) == expected
        torch.testing.assert_close(found, draw(model, compression, steps=6), atol=1e-4, rtol=1e-4)
        draw(compiled, compression, steps=9, seed=1)
    assert len(graphs) == expected


def test_the_second_length_of_prompts_makes_a_graph_for_all_others():
    model, graphs = random_model(CONFIG), []
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=lambda graph, inputs: graphs.append(graph) or graph.forward, fullgraph=True)
    for length in (5, 9, 7, 20, 6):
        with torch.no_grad():
            found = draw(compiled, (), steps=2, lengths=(1, length))
            torch.testing.assert_close(found, draw(model, (), steps=2, lengths=(1, length)), atol=1e-4, rtol=1e-4)
    assert len(graphs) == 2


def test_batches_and_their_longest_prompts_make_few_graphs():
    """By whether prompts differ in length, not by which is the longest; the size of the batch becomes a symbol."""
    model, graphs = random_model(CONFIG), []
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=lambda graph, inputs: graphs.append(graph) or graph.forward, fullgraph=True)
    with torch.no_grad():
        for lengths in ((9, 5, 5), (5, 9, 5), (5, 5, 9), (7, 8, 9), (3, 3, 3), (6, 6, 6), (3, 4), (5, 4), (2, 3, 4, 5), (5, 4, 2, 6)):
            draw(compiled, (), steps=2, lengths=(*[1] * len(lengths), *lengths))
    assert len(graphs) <= 5


@pytest.mark.parametrize("case", CASES)
def test_no_step_waits_for_the_device(case):
    config, compression, _ = CASES[case]
    model = random_model(config).to("meta")
    latent, timestep, context, mask = (
        torch.empty(shape, device="meta") for shape in ((2, 4, 9, 14), (2,), (2, 5, 32), (2, 5))
    )
    with torch.no_grad(), OnlyOn("meta"):
        for now in [[], *([one] for one in compression)]:
            for one_token in (None, OneToken(0, 1, False)):
                assert model(latent, timestep, context, mask, kv_compression=now, one_token=one_token).shape == (2, 8, 9, 14)


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: x.cpu(), lambda x: x[x > 0], lambda x: x.tolist(),
        lambda x: x + torch.tensor([1.0], device="cpu"), lambda x: torch.tensor([1.0, 2.0], device="cpu").to(x.device),
    ],
)  # fmt: skip
def test_the_check_itself_catches_what_waits(waits):
    with OnlyOn("meta"), pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
        waits(torch.empty(3, device="meta"))


def test_positions_are_made_once_and_time_is_embedded_once_a_step(monkeypatch):
    calls = {"positions": 0, "time": 0, "modulation": 0}
    model = random_model(CONFIG)
    made = embeddings.axis_positions

    def counted(*args):
        calls["positions"] += 1
        return made(*args)

    monkeypatch.setattr("pixart.model.axis_positions", counted)
    for name, module in (("time", model.t_embedder), ("modulation", model.t_block)):
        module.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    draw(model, (), steps=4)
    assert calls == {"positions": 1, "time": 4, "modulation": 4}


def test_positions_of_another_size_are_refused():
    model, latent = random_model(CONFIG), torch.zeros(1, 4, 8, 12)
    given = model.positions_of(torch.zeros(1, 4, 12, 8))
    with pytest.raises(InputError, match="positions are of 6 x 4 tokens; expected 4 x 6"):
        model(latent, torch.zeros(1), torch.zeros(1, 2, 32), positions=given)
    own = model(latent, torch.zeros(1), torch.zeros(1, 2, 32), positions=model.positions_of(latent))
    assert torch.equal(own, model(latent, torch.zeros(1), torch.zeros(1, 2, 32)))


@pytest.mark.parametrize(("lengths", "masked"), [((5, 5), False), ((1, 5), True)])
def test_a_mask_that_hides_nothing_is_left_out(lengths, masked):
    seen, model = [], random_model(CONFIG)
    model.register_forward_pre_hook(lambda _, args: seen.append(args[3]))
    denoise(model, torch.randn(1, 4, 4, 4), text(*lengths), make_scheduler(), steps=2, guidance=2.0)
    assert [mask is not None for mask in seen] == [masked, masked]
