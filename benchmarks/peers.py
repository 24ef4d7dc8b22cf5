"""One step with guidance on the same random XL/2 weights: ours, with KV compression too, ComfyUI's own PixArt, and diffusers'."""
from __future__ import annotations

import importlib
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.timing import synchronize
from pixart.attention import caption_lengths, one_token_of
from pixart.checkpoints import to_diffusers
from pixart.config import get_variant
from pixart.kv_compress import MAX_RATIO
from pixart.model import PixArtTransformer
from tests.support.checkpoint_factory import diffusers_config, stored_positions

CFG, TIMESTEP = 4.5, 500
TOKENS = (60, 1)  # of the prompt and the empty negative prompt: unequal, as in use
PADDED = 300  # tokens that diffusers' Sigma pipeline always computes
OURS, CORE, COMPILED, NATIVE, DIFFUSERS = "ours", "core", "compiled", "comfyui", "diffusers"
PEERS = (NATIVE, DIFFUSERS, COMPILED)  # that may be asked for
PAG = f"{OURS} pag"  # with perturbed-attention guidance, as PixArtPAG gives it
PAG_BLOCK = 14  # of 28, as in diffusers' example
XL_BLOCKS = 28


@dataclass(frozen=True)
class Compressed:
    """Training-free KV compression of the last `blocks` of 28 by `ratio`; written "14:2"."""

    blocks: int
    ratio: int

    @classmethod
    def parse(cls, text: str) -> Compressed:
        """Raises ValueError for anything but BLOCKS:RATIO."""
        blocks, _, ratio = text.partition(":")
        if not (blocks.isdecimal() and ratio.isdecimal() and 1 <= int(blocks) <= XL_BLOCKS and 2 <= int(ratio) <= MAX_RATIO):
            raise ValueError(f"{text!r} is no BLOCKS:RATIO; expected 1 to {XL_BLOCKS} blocks and a ratio of 2 to {MAX_RATIO}, like 14:2.")
        return cls(int(blocks), int(ratio))

    def __str__(self) -> str:
        return f"{self.blocks}:{self.ratio}"

    def first_block(self, depth: int) -> int:
        """Where it begins in a model of fewer blocks; raises ValueError if that is no whole number of them."""
        if self.blocks * depth % XL_BLOCKS:
            raise ValueError(f"{self.blocks} of {XL_BLOCKS} blocks is no whole number of {depth}; choose --blocks that fit")
        return depth - self.blocks * depth // XL_BLOCKS


@dataclass(frozen=True)
class Size:
    """One picture size of the benchmark: square, in pixels; blocks: how many of the model's 28 are run."""

    pixels: int
    blocks: int

    @property
    def tokens(self) -> int:
        return (self.pixels // 16) ** 2


class Workload:
    """Weights and inputs that all peers share.

    dtype: of the file, and of everybody's computing; as_user: the host's loaders choose what they compute in.
    """

    def __init__(
        self, size: Size, dtype: torch.dtype, device: str, tokens: tuple[int, int] = TOKENS, as_user: bool = False
    ) -> None:
        self.size, self.dtype, self.device, self.as_user = size, dtype, device, as_user
        self.config = replace(get_variant("sigma-512").transformer, depth=size.blocks)
        generator = torch.Generator().manual_seed(size.pixels)
        side = size.pixels // 8
        self.latent = torch.randn(1, 4, side, side, generator=generator)
        self.models: dict[str, Any] = {}  # of the host, by loader
        self.captions = [torch.randn(1, length, self.config.caption_channels, generator=generator) for length in tokens]

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """Original names; each matrix scaled by its width, so that nothing overflows."""
        with torch.device("meta"):
            shapes = {key: value.shape for key, value in PixArtTransformer(self.config).state_dict().items()}
        generator = torch.Generator().manual_seed(0)
        scales = {key: shape[1:].numel() ** -0.5 if len(shape) > 1 else 0.02 for key, shape in shapes.items()}
        return {key: torch.randn(shape, generator=generator).mul_(scales[key]).to(self.dtype) for key, shape in shapes.items()}

    def padded_captions(self, length: int) -> tuple[Tensor, Tensor]:
        """(2, length, C) with the prompt first, and the mask (2, length)."""
        states = torch.zeros(2, length, self.config.caption_channels)
        mask = torch.zeros(2, length, dtype=torch.bool)
        for row, caption in enumerate(self.captions):
            states[row, : caption.shape[1]], mask[row, : caption.shape[1]] = caption[0], True
        return states.to(self.device, self.dtype), mask.to(self.device)


def choose_host(attention: str, device: str) -> None:
    """Attention and device of the host in this process and those it starts; before anything imports it.

    attention: "pytorch", or "host" for what it would choose itself. Raises RuntimeError where the host runs already, elsewhere.
    """
    from tests.support import host

    os.environ[host.PYTORCH_ATTENTION] = "1" if attention == "pytorch" else ""
    os.environ[host.CUDA] = host.AS_HOST if device == "cuda" else ""
    host.start_host()
    chosen = importlib.import_module("comfy.cli_args").args
    if chosen.cpu != (device == "cpu"):
        raise RuntimeError(f"The host was started on {'a CPU' if chosen.cpu else 'CUDA'}; expected {device}: start a new process.")


def make_peer(name: str, work: Workload) -> Callable[[], float]:
    """A function that runs one step with guidance and returns its seconds; "ours 14:2" is ours with KV compression, "ours pag" with PAG."""
    make = {OURS: _host_step, NATIVE: _host_step, CORE: _core_step, COMPILED: _core_step, DIFFUSERS: _diffusers_step}
    peer, _, compressed = name.partition(" ")
    if peer not in make or (compressed and peer != OURS):
        raise ValueError(f"Unknown peer {name!r}; expected one of {', '.join(make)}, {PAG}, or {OURS} BLOCKS:RATIO.")
    return make[peer](work, name)


def _host_step(work: Workload, name: str) -> Callable[[], float]:
    """The host's sampling of either MODEL, with the sampler replaced by one call of the model that is timed."""
    from tests.support import host

    host.load_pack()
    sampling, samplers = importlib.import_module("comfy.sample"), importlib.import_module("comfy.samplers")
    model = host_model(work, name)
    if not work.as_user:
        model.set_model_compute_dtype(work.dtype)  # on a CPU the host's own PixArt would compute in fp32
    positive, negative = ([[caption, {}]] for caption in work.captions)
    times: list[float] = []

    def once(guider: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None, callback: Any = None, disable: Any = None) -> Tensor:
        synchronize()
        start = time.perf_counter()
        out = guider(x, sigmas[0] * x.new_ones(len(x)), **extra_args)
        synchronize()
        times.append(time.perf_counter() - start)
        return out

    sigma = model.get_model_object("model_sampling").sigmas[TIMESTEP]

    @torch.inference_mode()  # as the host runs its nodes
    def step() -> float:
        zeros = torch.zeros_like(work.latent)
        steps = torch.stack([sigma, torch.zeros_like(sigma)])
        sampling.sample_custom(
            model, work.latent, CFG, samplers.KSAMPLER(once), steps, positive, negative, zeros, disable_pbar=True
        )
        return times[-1]

    return step


def host_model(work: Workload, name: str) -> Any:
    """A MODEL of its own to patch, and what the name adds; peers of one loader share its weights."""
    from tests.support import host

    loader, _, change = name.partition(" ")
    if loader not in work.models:
        work.models[loader] = _load(work, loader)
    if not change:
        return work.models[loader].clone()
    if name == PAG:
        block = str(PAG_BLOCK * work.size.blocks // XL_BLOCKS)
        guide = host.pack_module("nodes.host.guidance").guide_by_perturbation
        return guide(work.models[loader], host.pack_module("pixart.guidance").PERTURBED_ATTENTION, block, 3.0, 0.0, 1.0)
    wanted = Compressed.parse(change)
    patch = host.pack_module("pixart.kv_compress").KVCompression(
        wanted.ratio, first_block=wanted.first_block(work.size.blocks), end_percent=1.0
    )  # fmt: skip
    return host.pack_module("nodes.host.kv_compress").compress_model(work.models[loader], patch)


def _load(work: Workload, name: str) -> Any:
    """The weights as MODEL, by our loader or by UNETLoader's."""
    from tests.support import host

    with tempfile.TemporaryDirectory(prefix="pixart-benchmark-") as folder:
        path = Path(folder) / "random.safetensors"
        sizes = work.config
        positions = stored_positions(32, sizes.hidden_size, sizes.position_range)  # which the host's own PixArt needs
        save_file({**work.weights, "pos_embed": positions}, path)
        if name == OURS:
            dtypes = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
            chosen = "default" if work.as_user else dtypes[work.dtype]
            model = host.pack_module("nodes.host.loader").load_model(str(path), "sigma-512", chosen)
        else:
            options = {} if work.as_user else {"dtype": work.dtype}
            model = importlib.import_module("comfy.sd").load_diffusion_model(str(path), model_options=options)
    for weight in model.model.parameters():  # out of the file's pages, which the system may drop while others have their turn
        weight.data = weight.data.clone()
    return model


def core_model(work: Workload) -> PixArtTransformer:
    """Our transformer with the weights."""
    model = PixArtTransformer(work.config, device="meta")
    model.load_state_dict({key: value.clone() for key, value in work.weights.items()}, assign=True)
    return model.to(work.device).eval().requires_grad_(False)


def _core_step(work: Workload, name: str) -> Callable[[], float]:
    """Our transformer without a host, under torch.compile or not: captions and positions as pixart.Pipeline gives them."""
    model = core_model(work)
    context, mask = work.padded_captions(max(TOKENS))
    positions = model.positions_of(work.latent.to(work.device))
    run = torch.compile(model, fullgraph=True) if name == COMPILED else model
    fixed = {"positions": positions, "one_token": one_token_of(caption_lengths(mask), max(TOKENS))}
    return _timed(work, lambda latent, timestep: run(latent, timestep, context, mask, **fixed))


def diffusers_model(work: Workload) -> Any:
    """diffusers' transformer with the weights."""
    from diffusers import PixArtTransformer2DModel

    sizes = work.config
    config = diffusers_config(
        hidden=sizes.hidden_size, depth=sizes.depth, captions=sizes.caption_channels, pixels=work.size.pixels,
        position_range=sizes.position_range,
    )  # fmt: skip
    with torch.device("meta"):
        model = PixArtTransformer2DModel.from_config(config)
    named = to_diffusers({key: value.clone() for key, value in work.weights.items() if "y_embedding" not in key})
    model.load_state_dict(named, assign=True, strict=False)
    if any(p.is_meta for p in model.parameters()):
        raise RuntimeError("diffusers' model kept parameters without weights; the key table no longer fits it")
    # Its positions are a buffer that isn't in the weights; as those of a model of this size, they aren't computed anew in each step.
    side = config["sample_size"]
    model.pos_embed = type(model.pos_embed)(
        height=side, width=side, patch_size=2, in_channels=4, embed_dim=sizes.hidden_size,
        interpolation_scale=config["interpolation_scale"],
    ).to(work.dtype)  # fmt: skip
    patches = {key.removeprefix("pos_embed."): value for key, value in named.items() if key.startswith("pos_embed.proj")}
    model.pos_embed.load_state_dict(patches, strict=False)
    return model.to(work.device).eval().requires_grad_(False)


def _diffusers_step(work: Workload, name: str) -> Callable[[], float]:
    """diffusers' transformer as its Sigma pipeline calls it: 300 tokens and a mask."""
    model = diffusers_model(work)
    context, mask = work.padded_captions(PADDED)
    added = {"resolution": None, "aspect_ratio": None}

    def call(latent: Tensor, timestep: Tensor) -> Tensor:
        return model(
            latent, encoder_hidden_states=context, timestep=timestep, encoder_attention_mask=mask.to(work.dtype),
            added_cond_kwargs=added, return_dict=False,
        )[0]  # fmt: skip

    return _timed(work, call)


def _timed(work: Workload, call: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], float]:
    """One batch of both captions, and guidance on the result."""
    latent = work.latent.to(work.device, work.dtype).expand(2, -1, -1, -1)
    timestep = torch.full((2,), float(TIMESTEP), device=work.device)

    @torch.inference_mode()
    def step() -> float:
        synchronize()
        start = time.perf_counter()
        positive, negative = call(latent, timestep)[:, :4].chunk(2)
        _ = negative + CFG * (positive - negative)
        synchronize()
        return time.perf_counter() - start

    return step
