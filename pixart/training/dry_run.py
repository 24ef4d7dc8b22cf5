"""What a run would do and what it would need, without its weights: `python -m pixart train RECIPE --dry-run`."""
from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..attention import CrossAttention, SelfAttention
from ..config import get_variant
from ..text.names import NF4
from .batch import Batch, Source
from .blocks import wrap_blocks
from .methods import Method
from .methods.full import attention_of
from .narrow_gradients import NarrowGradients
from .optimizers import block_matrices, state_bytes
from .precision import autocast
from .recipe import Recipe, Stage
from .teachers import networks_of

GIB = 2**30


def describe_run(recipe: Recipe, source: Source, accelerator: Accelerator) -> list[str]:
    """Lines on the pictures, the steps, what is trained, and the bytes in each process's memory."""
    method = recipe.method.make(recipe)
    recipe.objective.make().check_run(recipe, source)
    with torch.device("meta"):
        network = method.build(source, torch.device("meta"))
    processes = accelerator.num_processes
    return [
        *source.report(),
        *(_stage_line(number, stage, recipe) for number, stage in enumerate(recipe.stages)),
        *_memory_lines(recipe, method, network, processes),
        *_companion_lines(recipe, method, network, source, processes),
        *(_activation_line(recipe, number, method, network, source, accelerator) for number in range(len(recipe.stages))),
        f"result: {recipe.output}; states, log and pictures: {recipe.run_dir}",
    ]


def _stage_line(number: int, stage: Stage, recipe: Recipe) -> str:
    first = sum(each.steps for each in recipe.stages[:number])
    parts = f" in {stage.accumulation} parts" if stage.accumulation > 1 else ""
    rates = recipe.learning_rate(first + min(stage.steps - 1, recipe.warmup_steps)), recipe.learning_rate(first + stage.steps - 1)
    return (
        f"stage {number}: {stage.steps} steps at {stage.base_size} px, {stage.batch_size} pictures each{parts}, "
        f"{stage.steps * stage.batch_size} in all; learning rate {rates[0]:.3g} to {rates[1]:.3g}"
    )


def _memory_lines(recipe: Recipe, method: Method, network: nn.Module, processes: int) -> list[str]:
    every = [value for module in _modules(network) for value in _own_tensors(module)]
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    shares = processes if recipe.shard else 1
    weights = sum(map(_weight_bytes, _modules(network))) / shares
    gradients = NarrowGradients.gradient_bytes(trained, method.blocks(network), recipe, processes) / shares
    states = state_bytes(recipe.optimizer, trained, block_matrices(method.blocks(network))) / shares
    average = _bytes(trained) / shares if recipe.ema_decay else 0
    total = weights + gradients + states + average
    return [
        f"trains {_count(trained):,} of {_count(every):,} parameters by {recipe.optimizer}, precision {recipe.precision}",
        f"memory of each of {processes} processes: weights {_gib(weights)}, gradients {_gib(gradients)}, optimizer {_gib(states)}, "
        f"average {_gib(average)}, together {_gib(total)}; beside them the activations:",
    ]


def _companion_lines(recipe: Recipe, method: Method, network: nn.Module, source: Source, processes: int) -> list[str]:
    """Of networks that the objective has beside the one in training, a teacher's too; frozen weights that they share are counted once."""
    objective, shares = recipe.objective.make(), processes if recipe.shard else 1
    with torch.device("meta"):
        objective.wrap(network, source)
    shared, lines = {id(value) for module in _modules(network) for value in _own_tensors(module)}, []
    teacher, companions = getattr(objective, "teacher", None), objective.companions()
    for name, beside in {**(networks_of(teacher) if teacher else {}), **companions}.items():
        own = _bytes(value for module in _modules(beside) for value in _own_tensors(module) if id(value) not in shared)
        own /= shares if name in companions else 1  # others each process has whole
        trained = [parameter for parameter in beside.parameters() if parameter.requires_grad]
        states = state_bytes(recipe.optimizer, trained, block_matrices(method.blocks(beside))) / shares if trained else 0
        gradients = NarrowGradients.gradient_bytes(trained, method.blocks(beside), recipe, processes) / shares if trained else 0
        more = f", gradients {_gib(gradients)}, optimizer {_gib(states)}" if trained else ""
        lines.append(f"objective {recipe.objective.name} also keeps: {name}, weights of its own {_gib(own)}{more}")
    return lines


def _activation_line(recipe: Recipe, number: int, method: Method, network: nn.Module, source: Source, accelerator: Accelerator) -> str:
    stage = recipe.stages[number]
    rows = max(1, stage.batch_size // (accelerator.num_processes * stage.accumulation))
    tokens = get_variant(recipe.variant).max_tokens
    kept = activation_bytes(recipe, stage, method, network, rows, accelerator.device)
    how = "blocks checkpointed" if recipe.checkpoint_blocks else "all kept"
    return f"stage {number}: activations of {rows} pictures at once, captions of {tokens} tokens, {how}: about {_gib(kept)}"


def activation_bytes(
    recipe: Recipe, stage: Stage, method: Method, network: nn.Module, rows: int, device: torch.device
) -> int:
    """What a forward of the network keeps for its backward pass, counted on tensors without content.

    network: on the meta device. With checkpointed blocks that is their inputs, and all that one of them keeps.
    """
    with FakeTensorMode() as fake:
        for module in _modules(network):
            _give_content(module, device)
            if isinstance(module, SelfAttention | CrossAttention):  # made on the meta device, they have a card's
                module.attention = attention_of(device)
        wrap_blocks(method.blocks(network), compiled=False, checkpointed=False)
        counter = _Counter(method.blocks(network), known=[value for module in _modules(network) for value in _own_tensors(module)])
        batch, timestep = _batch(recipe, stage, rows, device), torch.zeros(rows, device=device)
        with counter, autocast(recipe.precision, device), fake:
            network(batch.latent, timestep, **method.conditions(network, batch))
    return counter.checkpointed() if recipe.checkpoint_blocks else counter.all()


def _modules(network: nn.Module) -> list[nn.Module]:
    """All modules, those of a ControlNet's base too, which is none of its own."""
    base = getattr(network, "base", None)
    return [*network.modules(), *(base.modules() if isinstance(base, nn.Module) else ())]


def _own_tensors(module: nn.Module) -> list[Tensor]:
    return [value for value in (*module._parameters.values(), *module._buffers.values()) if value is not None]


def _weight_bytes(module: nn.Module) -> float:
    """Of a module's own tensors; nf4 is made with fp8's shapes in a dry run, and has half a byte a value and an fp32 scale for 64."""
    size = _bytes(_own_tensors(module))
    return size - module.packed.numel() * (0.5 - 4 / 64) if getattr(module, "precision", None) == NF4 else size


def _give_content(module: nn.Module, device: torch.device) -> None:
    """Tensors of the meta device become fake ones of the device, for which autocast and kernels are chosen as in a run."""
    for name, value in list(module._parameters.items()):
        if value is not None:
            module._parameters[name] = nn.Parameter(torch.empty(value.shape, dtype=value.dtype, device=device), value.requires_grad)
    for name, value in list(module._buffers.items()):
        if value is not None:
            module._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device=device)


def _batch(recipe: Recipe, stage: Stage, rows: int, device: torch.device) -> Batch:
    """Rows of the stage's size with captions of full length and, for a ControlNet, hints."""
    variant = get_variant(recipe.variant)
    side = stage.base_size // 8
    latent = torch.zeros(rows, variant.transformer.in_channels, side, side, device=device)
    context = torch.zeros(rows, variant.max_tokens, variant.transformer.caption_channels, device=device)
    mask = torch.ones(rows, variant.max_tokens, dtype=torch.bool, device=device)
    sizes = torch.full((rows, 2), float(stage.base_size), device=device)
    captions = ("a " * variant.max_tokens,) * rows  # cut to the limit where a text encoder is trained
    return Batch(latent, context, mask, sizes, torch.ones(rows, device=device), float(rows), hint=latent, captions=captions)


class _Counter:
    """Bytes that autograd keeps, by the block that is running; weights and what was counted before are not counted again."""

    def __init__(self, blocks: Iterable[nn.Module], known: Iterable[Tensor]) -> None:
        self.kept, self.inputs, self.block = {-1: 0}, 0, -1
        self.alive: list[Tensor] = list(known)  # so that no storage is freed, and another gets its place
        self.seen = {value.untyped_storage()._cdata for value in self.alive}
        self.handles = []
        for number, block in enumerate(blocks):
            self.handles.append(block.register_forward_pre_hook(lambda _, inputs, number=number: self._enter(number, inputs)))
            self.handles.append(block.register_forward_hook(lambda *_: setattr(self, "block", -1)))
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda value: value)

    def __enter__(self) -> None:
        self.hooks.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)
        for handle in self.handles:
            handle.remove()

    def all(self) -> int:
        """Of everything that is kept."""
        return sum(self.kept.values())

    def checkpointed(self) -> int:
        """Where blocks keep their inputs alone, and one at a time is computed again."""
        return self.kept[-1] + self.inputs + max((size for block, size in self.kept.items() if block >= 0), default=0)

    def _enter(self, number: int, inputs: tuple[Any, ...]) -> None:
        self.block = number
        self.kept.setdefault(number, 0)
        self.inputs += _bytes([getattr(inputs[0], "hidden", inputs[0])])

    def _pack(self, value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.alive.append(value)
            self.kept[self.block] += storage.nbytes()
        return value


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in tensors)


def _count(tensors: Iterable[Tensor]) -> int:
    return sum(value.numel() for value in tensors)


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"
