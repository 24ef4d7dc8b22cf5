"""Random adapters as each trainer writes them, and the change of every weight that they mean, spelled out here once more.

Nothing of `pixart.adapters` is used: names are listed by hand, and the sums follow the papers' formulas.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

RANK = 4
Weights = Mapping[str, Tensor]


class Change(NamedTuple):
    """What rows start .. start + rows of a weight gain at strength 1, as a function of these rows."""

    key: str
    start: int
    rows: int
    function: Callable[[Tensor], Tensor]


class Sample(NamedTuple):
    """A file's tensors, and what they mean."""

    tensors: dict[str, Tensor]
    changes: list[Change]

    def merged(self, weights: Weights, strength: float) -> dict[str, Tensor]:
        """The weights with the changes added, in float32."""
        out = {key: value.detach().to(torch.float32, copy=True) for key, value in weights.items()}
        for key, start, rows, function in self.changes:
            out[key][start : start + rows] += strength * function(out[key][start : start + rows].clone())
        return out


SPLIT = {  # diffusers' name -> native weight, part, parts
    "transformer_blocks.0.attn1.to_q": ("blocks.0.attn.qkv.weight", 0, 3),
    "transformer_blocks.0.attn1.to_v": ("blocks.0.attn.qkv.weight", 2, 3),
    "transformer_blocks.1.attn1.to_out.0": ("blocks.1.attn.proj.weight", 0, 1),
    "transformer_blocks.1.attn2.to_q": ("blocks.1.cross_attn.q_linear.weight", 0, 1),
    "transformer_blocks.1.attn2.to_k": ("blocks.1.cross_attn.kv_linear.weight", 0, 2),
    "transformer_blocks.1.ff.net.0.proj": ("blocks.1.mlp.fc1.weight", 0, 1),
    "transformer_blocks.0.ff.net.2": ("blocks.0.mlp.fc2.weight", 0, 1),
    "adaln_single.linear": ("t_block.1.weight", 0, 1),
    "adaln_single.emb.timestep_embedder.linear_1": ("t_embedder.mlp.0.weight", 0, 1),
    "caption_projection.linear_1": ("y_embedder.y_proj.fc1.weight", 0, 1),
    "pos_embed.proj": ("x_embedder.proj.weight", 0, 1),
    "proj_out": ("final_layer.linear.weight", 0, 1),
}
FUSED = {
    name: (f"{name}.weight", 0, 1)
    for name in ("blocks.0.attn.qkv", "blocks.1.cross_attn.kv_linear", "blocks.1.mlp.fc1", "final_layer.linear", "x_embedder.proj")
}


def random(*shape: int, order: torch.Generator) -> Tensor:
    """Normal numbers, small enough that products stay near one."""
    return torch.randn(*shape, generator=order) * 0.3


def lora(shape: tuple[int, ...], order: torch.Generator, up_name: str, down_name: str, alpha: float | None) -> tuple[dict, Tensor]:
    up, down = random(shape[0], RANK, *[1] * (len(shape) - 2), order=order), random(RANK, *shape[1:], order=order)
    tensors = {up_name: up, down_name: down}
    if alpha is not None:
        tensors[".alpha"] = torch.tensor(alpha)
    return tensors, (alpha or RANK) / RANK * torch.einsum("or,rc->oc", up.flatten(1), down.flatten(1)).reshape(shape)


def peft(shape, order):
    return lora(shape, order, ".lora_B.weight", ".lora_A.weight", None)


def named_peft(shape, order):
    return lora(shape, order, ".lora_B.default.weight", ".lora_A.default.weight", None)


def kohya(shape, order):
    return lora(shape, order, ".lora_up.weight", ".lora_down.weight", 2.0)


def tucker(shape, order):
    """LoCon with a core: conv(in -> r, 1x1), conv(r -> r, kernel), conv(r -> out, 1x1)."""
    if len(shape) == 2:
        return kohya(shape, order)
    up, core = random(shape[0], RANK, 1, 1, order=order), random(RANK, RANK, *shape[2:], order=order)
    down = random(RANK, shape[1], 1, 1, order=order)
    change = torch.einsum("om,mnxy,ni->oixy", up[..., 0, 0], core, down[..., 0, 0]) / RANK
    return {".lora_up.weight": up, ".lora_mid.weight": core, ".lora_down.weight": down, ".alpha": torch.tensor(1.0)}, change


def loha(shape, order):
    columns = torch.empty(shape)[0].numel()
    a1, a2 = random(shape[0], RANK, order=order), random(shape[0], RANK, order=order)
    b1, b2 = random(RANK, columns, order=order), random(RANK, columns, order=order)
    tensors = {".hada_w1_a": a1, ".hada_w1_b": b1, ".hada_w2_a": a2, ".hada_w2_b": b2, ".alpha": torch.tensor(6.0)}
    return tensors, 6.0 / RANK * ((a1 @ b1) * (a2 @ b2)).reshape(shape)


def kron(first: Tensor, second: Tensor) -> Tensor:
    """Block matrix of first[i, j] * second."""
    return torch.cat([torch.cat([first[i, j] * second for j in range(first.shape[1])], 1) for i in range(first.shape[0])], 0)


def lokr(shape, order):
    """One whole factor, one decomposed, divided by its rank."""
    columns = torch.empty(shape)[0].numel()
    first, a, b = random(4, 2, order=order), random(shape[0] // 4, RANK, order=order), random(RANK, columns // 2, order=order)
    tensors = {".lokr_w1": first, ".lokr_w2_a": a, ".lokr_w2_b": b, ".alpha": torch.tensor(2.0)}
    return tensors, 2.0 / RANK * kron(first, a @ b).reshape(shape)


def whole_lokr(shape, order):
    """Two whole factors: LyCORIS stores an alpha, and doesn't use it."""
    columns = torch.empty(shape)[0].numel()
    first, second = random(2, 4, order=order), random(shape[0] // 2, columns // 4, order=order)
    return {".lokr_w1": first, ".lokr_w2": second, ".alpha": torch.tensor(1e10)}, kron(first, second).reshape(shape)


def difference(shape, order):
    change = random(*shape, order=order)
    return {".diff": change}, change


def tucker_loha(shape, order):
    """Two products of three, where the weight is a convolution's."""
    if len(shape) == 2:
        return loha(shape, order)
    tensors, factors = {".alpha": torch.tensor(3.0)}, []
    for i in (1, 2):
        core, a, b = (random(*size, order=order) for size in ((RANK, RANK, *shape[2:]), (RANK, shape[0]), (RANK, shape[1])))
        tensors |= {f".hada_t{i}": core, f".hada_w{i}_a": a, f".hada_w{i}_b": b}
        factors.append(torch.einsum("mnxy,mo,ni->oixy", core, a, b))
    return tensors, 3.0 / RANK * factors[0] * factors[1]


def tucker_lokr(shape, order):
    """Both factors decomposed, the second with a core where the weight is a convolution's."""
    rank, kernel = 2, shape[2:]
    w1a, w1b = random(4, rank, order=order), random(rank, 2, order=order)
    rows, columns = shape[0] // 4, shape[1] // 2
    tensors = {".lokr_w1_a": w1a, ".lokr_w1_b": w1b, ".alpha": torch.tensor(3.0)}
    if kernel:
        core, a, b = random(rank, rank, *kernel, order=order), random(rank, rows, order=order), random(rank, columns, order=order)
        second = torch.einsum("mnxy,mo,ni->oixy", core, a, b)
        tensors |= {".lokr_t2": core, ".lokr_w2_a": a, ".lokr_w2_b": b}
        rows_of_kernel = [[kron(w1a @ w1b, second[..., x, y]) for y in range(kernel[1])] for x in range(kernel[0])]
        change = torch.stack([torch.stack(line, -1) for line in rows_of_kernel], -2)
    else:
        a, b = random(rows, rank, order=order), random(rank, columns, order=order)
        tensors |= {".lokr_w2_a": a, ".lokr_w2_b": b}
        change = kron(w1a @ w1b, a @ b)
    return tensors, 3.0 / rank * change


def cayley(blocks: Tensor, largest: float) -> Tensor:
    """Dense rotation of all blocks; their antisymmetric parts together have at most this norm."""
    skew = [block - block.T for block in blocks]
    norm = torch.cat([q.flatten() for q in skew]).norm()
    skew = [q * min(1.0, largest / float(norm)) for q in skew]
    return torch.block_diag(*[torch.linalg.solve(torch.eye(len(q)) - q, torch.eye(len(q)) + q, left=False) for q in skew])


def oft(shape, order, alpha: float, per_row: bool):
    """Blocks of four rows turned; alpha bounds the norm, or the norm for each row."""
    blocks = random(shape[0] // 4, 4, 4, order=order)
    turn = cayley(blocks, alpha * shape[0] if per_row else alpha)
    return {".oft_blocks": blocks, ".alpha": torch.tensor(alpha)}, lambda weight: _on_rows(turn.T, weight) - weight


def lycoris_oft(shape, order):
    """With a bound that counts, and a factor for each row."""
    tensors, change = oft(shape, order, 0.01, per_row=True)
    factors = 1 + random(shape[0], *[1] * (len(shape) - 1), order=order)
    return {**tensors, ".rescale": factors}, lambda weight: factors * (change(weight) + weight) - weight


def kohya_oft(shape, order):
    """The blocks in a list of one."""
    tensors, change = oft(shape, order, 0.002, per_row=True)
    return {end.replace(".oft_blocks", ".oft_blocks.0"): tensor for end, tensor in tensors.items()}, change


def boft(shape, order):
    """Two stages: neighbours, then rows that lie four apart."""
    size, rows = 4, shape[0]
    stages, turn = random(2, rows // size, size, size, order=order), torch.eye(rows)
    for i, blocks in enumerate(stages):
        half = 2**i * size // 2
        places = sorted(range(rows), key=lambda row: (row // (2 * half), row % half, row // half % 2))
        gather = torch.eye(rows)[places]
        bound = 0.01 * rows * float((blocks - blocks.mT).norm() / (stages - stages.mT).norm())  # the bound is of all stages together
        turn = gather.T @ cayley(blocks, bound) @ gather @ turn
    return {".oft_blocks": stages, ".alpha": torch.tensor(0.01)}, lambda weight: _on_rows(turn, weight) - weight


def ia3(shape, order):
    """What comes out of a linear layer, and what goes into a convolution, is scaled."""
    on_input = len(shape) > 2
    factors = random(1, shape[1], 1, 1, order=order) if on_input else random(shape[0], order=order)
    change = factors if on_input else factors[:, None]
    return {".weight": factors, ".on_input": torch.tensor(int(on_input))}, lambda weight: weight * change


def replaced(shape, order):
    """The host's set_weight: the weight itself."""
    weight = random(*shape, order=order)
    return {".set_weight": weight}, lambda old: weight - old


def _on_rows(turn: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("or,r...->o...", turn, weight)


FORMATS: dict[str, tuple[str, dict, Callable]] = {  # name -> prefix, layers, algorithm
    "diffusers": ("transformer.", SPLIT, peft),
    "peft": ("base_model.model.", SPLIT, peft),
    "peft-named": ("base_model.model.", SPLIT, named_peft),
    "old-peft": ("unet.base_model.model.", SPLIT, peft),
    "native": ("diffusion_model.", FUSED, peft),
    "kohya-fused": ("lora_unet_", FUSED, kohya),
    "kohya-split": ("lora_unet_", SPLIT, kohya),
    "onetrainer": ("lora_transformer_", SPLIT, kohya),
    "locon-tucker": ("lycoris_", FUSED, tucker),
    "loha": ("lycoris_", SPLIT, loha),
    "lokr": ("lycoris_", SPLIT, lokr),
    "lokr-whole": ("lycoris_", FUSED, whole_lokr),
    "difference": ("diffusion_model.", FUSED, difference),
    "loha-tucker": ("lycoris_", FUSED, tucker_loha),
    "lokr-tucker": ("lycoris_", FUSED, tucker_lokr),
    "oft-lycoris": ("lycoris_", FUSED, lycoris_oft),
    "oft-split": ("lora_transformer_", SPLIT, partial(oft, alpha=0.01, per_row=True)),
    "oft-kohya": ("oft_unet_", FUSED, kohya_oft),
    "oft-comfyui": ("diffusion_model.", FUSED, partial(oft, alpha=1.0, per_row=False)),
    "boft": ("lycoris_", FUSED, boft),
    "ia3": ("lycoris_", FUSED, ia3),
    "replaced": ("diffusion_model.", FUSED, replaced),
    "dora-peft": ("base_model.model.", SPLIT, peft),
    "dora-rows": ("lora_transformer_", SPLIT, kohya),
    "dora-columns": ("lycoris_", FUSED, loha),
}
MAGNITUDES = {"dora-peft": ".lora_magnitude_vector", "dora-rows": ".dora_scale", "dora-columns": ".dora_scale"}


def make(name: str, weights: Weights, seed: int = 0) -> Sample:
    """An adapter in one of FORMATS for a model with these native weights."""
    prefix, layers, algorithm = FORMATS[name]
    order, sample = torch.Generator().manual_seed(seed), Sample({}, [])
    for layer, (key, part, parts) in layers.items():
        rows = weights[key].shape[0] // parts
        tensors, change = algorithm((rows, *weights[key].shape[1:]), order)
        function = change if callable(change) else partial(_same, change=change)
        if name in MAGNITUDES:
            columns = name == "dora-columns"
            size = weights[key].shape[1] if columns else rows
            magnitude = torch.rand(size, generator=order) + 0.5
            others = [1] * (weights[key].ndim - 2)
            shape = (1, size, *others) if columns else (size, 1, *others)
            if name == "dora-peft":
                shape = (1, size, *others) if others else (size,)
            tensors[MAGNITUDES[name]] = magnitude.reshape(shape)
            function = partial(_dora, change=change, magnitude=magnitude, columns=columns)
        flat = layer.replace(".", "_") if prefix.endswith("_") else layer
        sample.tensors.update({f"{prefix}{flat}{end}": tensor.contiguous() for end, tensor in tensors.items()})
        sample.changes.append(Change(key, part * rows, rows, function))
    return sample


def _same(weight: Tensor, change: Tensor) -> Tensor:
    """The change of an adapter that doesn't look at the weight."""
    return change


def _dora(weight: Tensor, change: Tensor, magnitude: Tensor, columns: bool) -> Tensor:
    """m (W + dW) / ||W + dW|| - W, one row or column at a time."""
    changed = weight + change
    lines = changed.unbind(1) if columns else changed.unbind(0)
    return torch.stack([m * line / line.norm() for m, line in zip(magnitude, lines)], dim=1 if columns else 0) - weight
