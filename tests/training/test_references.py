"""One step of each method and objective: the loss and every gradient are those of diffusers' transformer, PEFT and the formulas."""
from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

peft = pytest.importorskip("peft")
pytest.importorskip("diffusers")

from pixart.checkpoints import load_transformer
from pixart.config import TransformerConfig, Variant
from pixart.errors import ConfigError
from pixart.training import initialize
from pixart.training.bases import PackedLinear
from pixart.training.batch import Batch
from pixart.training.draws import Draws
from pixart.training.methods import full
from pixart.training.objectives import denoise
from pixart.training.recipe import Recipe, make_recipe
from pixart.training.teacher import without_adapters
from tests.support import checkpoint_factory as factory
from tests.support import kv_reference, tiny_control
from tests.support import training_reference as reference
from tests.support.tiny_training import recipe_values

TIMESTEPS = torch.tensor([0, 3, 420, 999])
CONFIG = TransformerConfig(hidden_size=72, depth=3, num_heads=1, mlp_hidden=288, caption_channels=32)
SPLIT = {"attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"), "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
         "attn.proj": ("attn1.to_out.0",), "cross_attn.q_linear": ("attn2.to_q",), "cross_attn.proj": ("attn2.to_out.0",),
         "mlp.fc1": ("ff.net.0.proj",), "mlp.fc2": ("ff.net.2",)}  # fmt: skip
OUTSIDE = {"t_block.1": "adaln_single.linear", "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
           "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2", "y_embedder.y_proj.fc1": "caption_projection.linear_1",
           "y_embedder.y_proj.fc2": "caption_projection.linear_2", "final_layer.linear": "proj_out"}  # fmt: skip


@dataclass
class Start:
    """A base in a file and as diffusers' model, and what a step is given."""

    path: Path
    model: nn.Module
    batch: Batch
    noise: Tensor
    draws: Draws
    captions: dict[str, Any]  # of `reference.predict`

    def recipe(self, folder: Path, **changes: Any) -> Recipe:
        return make_recipe(recipe_values(folder, initialize=str(self.path), **{"objective": "denoise", **changes}), "r")


class NoSource:
    """A source that a method asks nothing but a few pictures to measure on."""

    null_context, feature_count = torch.zeros(1, 32), 0

    def __init__(self, batch: Batch) -> None:
        self.kept = batch

    def batch(self, settings: Any, stage: Any, draws: Draws) -> Batch:
        picked = [row % len(self.kept.latent) for row in draws.rows]
        return Batch(*(getattr(self.kept, name)[picked] for name in ("latent", "context", "mask", "size", "weight")), total=1.0)


def start(folder: Path, monkeypatch: pytest.MonkeyPatch, micro: bool = False, captions: tuple[str, ...] | None = None) -> Start:
    family, rows = ("alpha", 120) if micro else ("sigma", 300)
    config = replace(CONFIG, micro_condition=micro, max_tokens=rows)
    monkeypatch.setattr(full, "get_variant", lambda name: Variant("demo", "tiny", family, 1024, rows, 0.13025, "demo", config))
    monkeypatch.setattr(initialize, "load_transformer", lambda path, variant, dtype: load_transformer(path, dtype=dtype))
    monkeypatch.setattr(denoise, "draw_timesteps", lambda settings, draws: TIMESTEPS)
    sizes, diffusers, original = factory.tiny_weights(micro=micro, null_rows=rows, hidden=72, depth=3, captions=32)
    path = factory.write("safetensors", folder / "base", sizes, diffusers, original)
    model = factory.reference_model(sizes).requires_grad_(True)
    order = torch.Generator().manual_seed(7)
    latent, context = torch.randn(4, 4, 8, 8, generator=order), torch.randn(4, 5, 32, generator=order)
    mask = torch.arange(5) < torch.tensor([5, 1, 3, 4])[:, None]
    size = torch.tensor([[64.0, 64], [64, 128], [128, 64], [96, 32]])
    draws = Draws(3, 0, 0, range(4))
    batch = Batch(latent, context, mask, size, torch.ones(4), 4.0, captions=captions)
    told = {"context": context, "mask": mask, **({"size": size} if micro else {})}
    return Start(path, model, batch, draws.normal("noise", (4, 8, 8)), draws, told)


def step(begun: Start, recipe: Recipe, prepare: Any = lambda network: None) -> tuple[nn.Module, dict[str, Tensor]]:
    """The network after a backward pass, and the named losses."""
    torch.manual_seed(0)
    method, objective, source = recipe.method.make(recipe), recipe.objective.make(), NoSource(begun.batch)
    network = method.build(source, torch.device("cpu"))
    prepare(network)
    model = objective.wrap(network, source)
    losses = objective.losses(recipe.objective.settings, model, method.conditions(network, begun.batch), begun.batch, begun.draws)
    sum(losses.values()).mean().backward()
    return network, losses


def expected_step(begun: Start, prediction: Tensor) -> tuple[Tensor, Tensor]:
    """The reference's losses after a backward pass of its own."""
    errors, bounds = reference.losses(prediction, begun.batch.latent, begun.noise, TIMESTEPS)
    (errors + bounds).mean().backward()
    return errors, bounds


def predicted(begun: Start, model: nn.Module) -> Tensor:
    return reference.predict(model, reference.noisy(begun.batch.latent, begun.noise, TIMESTEPS).float(), TIMESTEPS, **begun.captions)


def assert_losses(losses: dict[str, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for name, wanted in zip(("noise_loss", "variance_loss"), expected):
        torch.testing.assert_close(losses[name].double(), wanted, rtol=1e-5, atol=1e-5)


def diffusers_gradients(model: nn.Module, depth: int = 3) -> dict[str, Tensor]:
    return factory.original_keys(reference.gradients(model.named_parameters()), depth)


@pytest.mark.parametrize("micro", [False, True])
def test_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro: bool) -> None:
    begun = start(tmp_path, monkeypatch, micro)
    network, losses = step(begun, begun.recipe(tmp_path))
    assert_losses(losses, expected_step(begun, predicted(begun, begun.model)))
    reference.assert_gradients(reference.gradients(network.named_parameters()), diffusers_gradients(begun.model))


def test_weights_of_timesteps_and_of_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = start(tmp_path, monkeypatch)
    objective = {"name": "denoise", "min_snr": 5, "max_loss_weight": 20, "variance_weight": 0.3}
    _, losses = step(begun, begun.recipe(tmp_path, objective=objective))
    errors, bounds = expected_step(begun, predicted(begun, begun.model))
    ratio = (reference.SIGNAL / (1 - reference.SIGNAL))[TIMESTEPS]
    weight = (1 / reference.SIGNAL[TIMESTEPS]).clamp(max=20) * torch.minimum(ratio, torch.tensor(5.0)) / ratio
    assert_losses(losses, (errors * weight, bounds * 0.3))


# -- adapters ------------------------------------------------------------------------------------

KINDS = {
    "lora": ({"kind": "lora", "rank": 4}, lambda targets: peft.LoraConfig(r=4, lora_alpha=4, target_modules=targets)),
    "alpha": ({"kind": "lora", "rank": 4, "alpha": 6}, lambda targets: peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets)),
    "rslora": ({"kind": "lora", "rank": 9, "alpha": 2, "rank_stabilized": True},
               lambda targets: peft.LoraConfig(r=9, lora_alpha=2, use_rslora=True, target_modules=targets)),
    "dora": ({"kind": "dora", "rank": 4}, lambda targets: peft.LoraConfig(r=4, lora_alpha=4, use_dora=True, target_modules=targets)),
    "loha": ({"kind": "loha", "rank": 3, "alpha": 2}, lambda targets: peft.LoHaConfig(r=3, alpha=2, target_modules=targets)),
    "lokr": ({"kind": "lokr", "rank": 2, "alpha": 3}, lambda targets: peft.LoKrConfig(r=2, alpha=3, target_modules=targets)),
    "lokr-whole": ({"kind": "lokr", "rank": 64, "alpha": 32}, lambda targets: peft.LoKrConfig(r=64, alpha=32, target_modules=targets)),
}  # fmt: skip
ROWS = ("lora_B", "hada_w1_a", "hada_w2_a", "magnitude")  # are split where diffusers' layers are


def randomize(network: nn.Module) -> None:
    """Every matrix of an adapter, so that none is hidden behind a zero; by name, so that both sides agree."""
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            draw = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(sum(map(ord, name))))
            parameter.data = parameter.data * (1 + 0.1 * draw) if "magnitude" in name else 0.2 * draw


def sources_of(module: str) -> list[str]:
    """diffusers' names of a native layer, spelled out once more."""
    if module in OUTSIDE:
        return [OUTSIDE[module]]
    _, block, rest = module.split(".", 2)
    return [f"transformer_blocks.{block}.{name}" for name in SPLIT[rest]]


def pieces(name: str, prefix: str) -> list[tuple[str, int, int]]:
    """(name in PEFT's model of diffusers, part, parts) of one of our adapter's parameters; parts is 1 for shared matrices."""
    module, role = next((name[: name.index(f".{mark}")], name[name.index(f".{mark}") :]) for mark in ("lora_", "hada_", "lokr_") if f".{mark}" in name)
    sources = sources_of(module)
    split = any(mark in role for mark in ROWS)
    return [(f"{prefix}{source}{role}", part if split else 0, len(sources) if split else 1) for part, source in enumerate(sources)]


def copied_adapter(network: nn.Module, model: nn.Module, config: Any) -> nn.Module:
    """PEFT's own model of diffusers' transformer, with the values of ours."""
    made = peft.get_peft_model(model.requires_grad_(False), config)
    named = dict(made.named_parameters())
    for name, value in network.named_parameters():
        if value.requires_grad:
            for place, part, parts in pieces(name, "base_model.model."):
                named[place].data = value.detach().chunk(parts)[part].clone()
    return made


def adapter_gradients(network: nn.Module, made: nn.Module) -> dict[str, Tensor]:
    """PEFT's gradients by our names: those of a matrix that fused layers share are summed."""
    theirs = reference.gradients(made.named_parameters())
    found, used = {}, set()
    for name, value in network.named_parameters():
        if value.requires_grad:
            places = pieces(name, "base_model.model.")
            used |= {place for place, _, _ in places}
            parts = [theirs[place] for place, _, _ in places]
            found[name] = torch.cat(parts) if places[0][2] > 1 else sum(parts)
    assert used == theirs.keys()
    return found


def targets_of(names: list[str]) -> list[str]:
    return [source for name in names for source in sources_of(name)]


ON_BASES = [*((kind, None) for kind in KINDS), *((kind, base) for kind in ("lora", "dora", "loha", "lokr") for base in ("fp8", "nf4"))]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("kind", "base"), ON_BASES)
def test_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, base: str | None) -> None:
    if base == "nf4":
        pytest.importorskip("bitsandbytes")
    begun = start(tmp_path, monkeypatch)
    settings, config = KINDS[kind]
    layers = ("attn.proj", "cross_attn.q_linear", "mlp.fc2") if kind.startswith("lokr") else ("attn.qkv", "cross_attn.kv_linear", "mlp.fc1")
    method = {"name": "lora", **settings, "base": base, "targets": list(layers), "blocks": [0, 2]}
    network, losses = step(begun, begun.recipe(tmp_path, method=method), randomize)
    packed = {name: module for name, module in network.named_modules() if isinstance(module, PackedLinear)}
    assert len(packed) == (3 * 7 if base else 0)
    with torch.no_grad():
        for name, layer in packed.items():  # the reference computes with the unpacked weights
            sources = sources_of(name.replace(".base_layer", ""))
            for source, piece in zip(sources, layer.weight.chunk(len(sources))):
                begun.model.get_submodule(source).weight.copy_(piece)
    targets = targets_of([f"blocks.{block}.{layer}" for block in (0, 2) for layer in layers])
    made = copied_adapter(network, begun.model, config(targets))
    assert_losses(losses, expected_step(begun, predicted(begun, made)))
    reference.assert_gradients(reference.gradients(network.named_parameters()), adapter_gradients(network, made))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_linear_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = start(tmp_path, monkeypatch)
    network, losses = step(begun, begun.recipe(tmp_path, method={"name": "lora", "rank": 2, "targets": "all"}), randomize)
    layers = [*OUTSIDE, *(f"blocks.{block}.{layer}" for block in range(3) for layer in SPLIT)]
    made = copied_adapter(network, begun.model, peft.LoraConfig(r=2, lora_alpha=2, target_modules=targets_of(layers)))
    assert_losses(losses, expected_step(begun, predicted(begun, made)))
    reference.assert_gradients(reference.gradients(network.named_parameters()), adapter_gradients(network, made))
    with without_adapters(network), torch.no_grad():
        plain = network(begun.batch.latent, TIMESTEPS, begun.batch.context, begun.batch.mask)
    torch.testing.assert_close(plain, load_transformer(begun.path)(begun.batch.latent, TIMESTEPS, begun.batch.context, begun.batch.mask))
    assert all(value.requires_grad == ("lora_" in name) for name, value in network.named_parameters())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_t5_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sentencepiece")
    from tests.support.tiny_pipeline import padded_embeddings
    from tests.support.tiny_text import save_t5_file, tiny_t5

    texts = ("a red circle", "", "green star above the tree", "dog")
    begun = start(tmp_path, monkeypatch, captions=texts)
    t5 = tiny_t5(width=32)
    source = {"name": "scenes", "text_encoder": str(save_t5_file(t5, tmp_path / "t5.safetensors"))}
    method = {"name": "lora", "rank": 4, "text_rank": 2, "targets": "attention+mlp"}
    network, losses = step(begun, begun.recipe(tmp_path, method=method, source=source), randomize)

    names = ["q", "k", "v", "o", "wi_0", "wi_1", "wo"]
    text = peft.get_peft_model(t5.requires_grad_(False), peft.LoraConfig(r=2, lora_alpha=2, target_modules=names))
    own = {name.removeprefix("text_encoder."): value for name, value in network.named_parameters() if name.startswith("text_encoder.")}
    for name, value in text.named_parameters():
        if value.requires_grad:
            value.data = own[name.removeprefix("base_model.model.")].detach().clone()
    layers = [f"blocks.{block}.{layer}" for block in range(3) for layer in SPLIT]
    made = copied_adapter(network.transformer, begun.model, peft.LoraConfig(r=4, lora_alpha=4, target_modules=targets_of(layers)))
    monkeypatch.setattr(torch, "no_grad", torch.enable_grad)  # the support module encodes without gradients
    states, mask = padded_embeddings(text, list(texts), 12)
    begun.captions = {"context": states, "mask": mask}
    assert_losses(losses, expected_step(begun, predicted(begun, made)))
    ours = reference.gradients(network.named_parameters())
    theirs = {f"text_encoder.{name.removeprefix('base_model.model.')}": value for name, value in reference.gradients(text.named_parameters()).items()}
    theirs |= {f"transformer.{name}": value for name, value in adapter_gradients(network.transformer, made).items()}
    reference.assert_gradients(ours, theirs)
    assert any(name.startswith("text_encoder.") and bool(value.any()) for name, value in ours.items())


# -- ControlNet and KV compression ---------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("micro", [False, True])
def test_controlnet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, depth: int, micro: bool) -> None:
    begun = start(tmp_path, monkeypatch, micro)
    hint = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    begun.batch = replace(begun.batch, hint=hint)
    control = tiny_control.reference_control(hidden=72, depth=depth)

    def prepare(network: nn.Module) -> None:
        for index in range(depth):  # a ControlNet begins as a copy
            assert torch.equal(network.controlnet.controlnet[index].copied_block.attn.qkv.weight, network.base.blocks[index].attn.qkv.weight)
        network.controlnet.load_state_dict(tiny_control.original_keys(control))

    network, losses = step(begun, begun.recipe(tmp_path, method={"name": "controlnet", "blocks": depth}), prepare)
    control.requires_grad_(True)
    monkeypatch.setattr(begun.model, "forward", lambda latent, encoder_hidden_states, timestep, encoder_attention_mask, added_cond_kwargs, return_dict: (
        tiny_control.reference_forward.__wrapped__(begun.model, [(control, hint, 1.0)], latent, timestep, encoder_hidden_states, encoder_attention_mask, added_cond_kwargs)[0],
    ))  # fmt: skip
    assert_losses(losses, expected_step(begun, predicted(begun, begun.model)))
    for block in control.controlnet_blocks:
        for value in block.parameters():
            value.grad = torch.zeros_like(value) if value.grad is None else value.grad
    with torch.no_grad():
        for value in control.parameters():
            value.copy_(value.grad)
    expected = {f"controlnet.{name}": value for name, value in tiny_control.original_keys(control).items()}
    reference.assert_gradients(reference.gradients(network.named_parameters()), expected)
    assert all(value.grad is None for value in network.base.parameters())


def compressed_reference(begun: Start, network: nn.Module, blocks: dict[int, int]) -> dict[int, dict[str, Tensor]]:
    """Gives diffusers' model the compression of ours; returns its own weights, which require gradients."""
    weights = {}
    for block, ratio in blocks.items():
        attention = network.blocks[block].attn
        own = {name: getattr(getattr(attention, name.split(".")[0]), name.split(".")[1]).detach().clone().requires_grad_()
               for name in ("sr.weight", "sr.bias", "norm.weight", "norm.bias")}  # fmt: skip
        weights[block] = own
        layer = begun.model.transformer_blocks[block].attn1
        with torch.no_grad():  # the beginning scales the queries
            layer.to_q.weight.copy_(attention.qkv.weight[:72])
            layer.to_q.bias.copy_(attention.qkv.bias[:72])

        def merge(k: Tensor, v: Tensor, ratio: int = ratio, own: dict[str, Tensor] = own):
            return *(kv_reference.shrink(x, (4, 4), ratio, "conv", own) for x in (k, v)), 0.0

        layer.set_processor(kv_reference.LoopAttention(merge))
    return weights


@pytest.mark.parametrize("objective", ["denoise", "imitate"])
def test_kv_compression(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: str) -> None:
    begun = start(tmp_path, monkeypatch)
    plain = predicted(begun, begun.model).detach()  # of the uncompressed model
    chosen = {"name": "imitate", "imitate_weight": 2.0, "denoise_weight": 0.5} if objective == "imitate" else "denoise"
    network, losses = step(begun, begun.recipe(tmp_path, method={"name": "kv", "blocks": [[0, 2], [2, 4]]}, objective=chosen))
    weights = compressed_reference(begun, network, {0: 2, 2: 4})
    prediction = predicted(begun, begun.model)
    errors, bounds = reference.losses(prediction, begun.batch.latent, begun.noise, TIMESTEPS)
    if objective == "imitate":
        apart = (prediction - plain).double().square().mean((1, 2, 3))
        torch.testing.assert_close(losses["imitate_loss"].double(), 2 * apart, rtol=1e-5, atol=1e-5)
        assert float(apart.detach().max()) > 1e-3
        errors, bounds = errors / 2, bounds / 2
        (2 * apart + errors + bounds).mean().backward()
    else:
        (errors + bounds).mean().backward()
    assert_losses(losses, (errors, bounds))
    expected = diffusers_gradients(begun.model)
    for block, own in weights.items():
        expected |= {f"blocks.{block}.attn.{name}": value.grad for name, value in own.items()}
    reference.assert_gradients(reference.gradients(network.named_parameters()), expected)


@pytest.mark.parametrize("method", ["full", {"name": "lora", "rank": 2}])
def test_only_the_prior_is_imitated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Any) -> None:
    """Its rows have the difference from the first weights, weighted by the timestep; the others the usual losses."""
    begun = start(tmp_path, monkeypatch)
    begun.batch = replace(begun.batch, prior=torch.tensor([True, False, True, False]))
    chosen = {"name": "imitate", "imitate_weight": 3.0, "prior_only": True, "max_loss_weight": 20}
    recipe = begun.recipe(tmp_path, method=method, objective=chosen)
    objective, source = recipe.objective.make(), NoSource(begun.batch)
    network = recipe.method.make(recipe).build(source, torch.device("cpu"))
    objective.wrap(network, source)
    if method == "full":  # its own numbers, a little changed
        for number, value in enumerate(network.parameters()):
            value.data += 0.02 * torch.randn(value.shape, generator=torch.Generator().manual_seed(number))
    else:
        randomize(network)
    conditions = {"context": begun.batch.context, "context_mask": begun.batch.mask}
    losses = objective.losses(recipe.objective.settings, network, conditions, begun.batch, begun.draws)
    sum(losses.values()).mean().backward()
    found = reference.gradients(network.named_parameters())
    network.zero_grad()
    prediction, first = predicted_by(network, begun), predicted_by(load_transformer(begun.path), begun).detach()
    weight = (1 / reference.SIGNAL[TIMESTEPS]).clamp(max=20)
    (noise, variance), (first_noise, first_variance) = prediction.chunk(2, dim=1), first.chunk(2, dim=1)
    apart = ((noise - first_noise).square().mean((1, 2, 3)) * weight + (variance - first_variance).square().mean((1, 2, 3))) / 2
    errors, bounds = reference.losses(prediction, begun.batch.latent, begun.noise, TIMESTEPS)
    prior = begun.batch.prior
    expected = {"imitate_loss": 3 * apart * prior, "noise_loss": errors * weight * ~prior, "variance_loss": bounds * ~prior}
    assert set(losses) == set(expected) and float(apart[prior].detach().min()) > 1e-4
    for name, wanted in expected.items():
        torch.testing.assert_close(losses[name].double(), wanted.double(), rtol=1e-5, atol=1e-5)
    sum(expected.values()).mean().backward()
    reference.assert_gradients(found, reference.gradients(network.named_parameters()))


def predicted_by(network: nn.Module, begun: Start) -> Tensor:
    """Of the step's noisy latents."""
    noisy = reference.noisy(begun.batch.latent, begun.noise, TIMESTEPS).float()
    return network(noisy, TIMESTEPS, context=begun.batch.context, context_mask=begun.batch.mask).float()


def test_a_prior_that_no_source_has_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = start(tmp_path, monkeypatch)
    with pytest.raises(ConfigError, match="prior_only is true, but no picture shows what to keep, or all that do were left out. Set source.prior_data"):
        step(begun, begun.recipe(tmp_path, objective={"name": "imitate", "prior_only": True}))
    with pytest.raises(ConfigError, match="denoise_weight is 0.5; with prior_only the other pictures teach at weight 1"):
        begun.recipe(tmp_path, objective={"name": "imitate", "prior_only": True, "denoise_weight": 0.5})


@pytest.mark.parametrize("method", ["full", {"name": "lora", "rank": 2}])
def test_a_network_imitates_itself_at_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Any) -> None:
    begun = start(tmp_path, monkeypatch)
    _, losses = step(begun, begun.recipe(tmp_path, method=method, objective="imitate"))
    assert list(losses) == ["imitate_loss"] and float(losses["imitate_loss"].detach().abs().max()) == 0
    changed = begun.recipe(tmp_path, method=method, objective="imitate")
    objective = changed.objective.make()
    network = changed.method.make(changed).build(NoSource(begun.batch), torch.device("cpu"))
    objective.wrap(network, NoSource(begun.batch))
    randomize(network)
    conditions = {"context": begun.batch.context, "context_mask": begun.batch.mask}
    moved = objective.losses(changed.objective.settings, network, conditions, begun.batch, begun.draws)["imitate_loss"]
    with torch.no_grad():
        noisy = reference.noisy(begun.batch.latent, begun.noise, TIMESTEPS).float()
        apart = network(noisy, TIMESTEPS, **conditions) - load_transformer(begun.path)(noisy, TIMESTEPS, **conditions)
    torch.testing.assert_close(moved, apart.square().mean((1, 2, 3)))
    assert float(moved.detach().min()) > 1e-4
