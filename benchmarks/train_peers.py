"""Training steps on random weights and pictures: this project's loop, and a plain one of diffusers and peft with the same settings."""
from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from torch import Tensor, autocast, nn

from benchmarks.peers import PADDED, TOKENS, Size, Workload, diffusers_model
from benchmarks.timing import synchronize
from pixart.config import get_variant
from pixart.training.batch import Batch
from pixart.training.draws import Draws
from pixart.training.loop import Loop
from pixart.training.methods import full
from pixart.training.recipe import Recipe, Stage, make_recipe

OURS, PLAIN = "ours", "plain"
VARIANT, RANK, CLIP, RATE = "sigma-512", 16, 1.0, 1e-5
PLAIN_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]  # of both attentions, the layers of the preset "attention"


@dataclass(frozen=True)
class Case:
    """What is trained, and how; the same for both contenders."""

    method: str  # "lora" or "full"
    precision: str  # "bf16" or "fp32"
    optimizer: str
    pixels: int
    batch: int
    blocks: int
    checkpointed: bool
    device: str
    trimmed: bool = False  # of ours: `trim_memory`

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def make_step(contender: str, case: Case) -> Callable[[], float]:
    """A function that makes one update and returns its seconds."""
    update = {OURS: _ours, PLAIN: _plain}[contender](case)

    def step() -> float:
        synchronize()
        start = time.perf_counter()
        update()
        synchronize()
        return time.perf_counter() - start

    return step


@dataclass(frozen=True)
class NoSettings:
    """Of the random source."""


class RandomSource:
    """The same random pictures at every step, with captions of the tokens that a prompt has."""

    feature_count, null_context = 0, None

    def __init__(self, case: Case) -> None:
        config = get_variant(VARIANT).transformer
        side, generator = case.pixels // 8, torch.Generator().manual_seed(0)
        self.made = Batch(
            latent=torch.randn(case.batch, config.in_channels, side, side, generator=generator),
            context=torch.randn(case.batch, TOKENS[0], config.caption_channels, generator=generator),
            mask=torch.ones(case.batch, TOKENS[0], dtype=torch.bool),
            size=torch.full((case.batch, 2), float(case.pixels)), weight=torch.ones(case.batch), total=float(case.batch),
        )  # fmt: skip

    def batch(self, settings: Any, stage: Stage, draws: Draws) -> Batch:
        """All of them."""
        return self.made

    def prepare(self, prompts: Any, accelerator: Any) -> None:
        """There is nothing to compute."""

    def contents(self) -> list[str]:
        """No pictures are kept."""
        return []


@dataclass(frozen=True)
class Given:
    """Stands for a recipe's source, without the name of a module."""

    case: Case
    settings: NoSettings = NoSettings()
    name: str = "random"

    def make(self, recipe: Recipe) -> RandomSource:
        """The source."""
        return RandomSource(self.case)

    def changed(self, values: Any, source: str) -> Given:
        """Nothing can be."""
        return self


def _ours(case: Case) -> Callable[[], Any]:
    """The loop's own update, with everything that it does in a run but saving."""
    with _variant_of(case.blocks), tempfile.TemporaryDirectory(prefix="pixart-benchmark-") as folder:
        start = str(_random_file(case, Path(folder))) if case.method == "lora" else None
        loop = Loop(_recipe(case, start, Path(folder)))
        if case.method == "lora":  # out of the file's pages, which are deleted
            for parameter in loop.network.parameters():
                parameter.data = parameter.data.clone()

    def update() -> None:
        loop._train_step()
        loop.step += 1

    return update


def _recipe(case: Case, start: str | None, folder: Path) -> Recipe:
    stage = {"base_size": case.pixels, "steps": 10**6, "batch_size": case.batch, "learning_rate": RATE}
    values = {
        "variant": VARIANT, "method": {"name": "lora", "rank": RANK} if case.method == "lora" else "full", "objective": "denoise",
        "source": {"name": "scenes", "text_encoder": ""}, "output": str(folder / "out.safetensors"), "initialize": start,
        "precision": case.precision, "optimizer": case.optimizer, "clip_norm": CLIP, "ema_decay": 0.0, "caption_dropout": 0.0,
        "betas": [0.9, 0.999], "checkpoint_blocks": case.checkpointed, "trim_memory": case.trimmed, "stages": [stage],
    }  # fmt: skip
    return replace(make_recipe(values, "benchmark"), source=Given(case))


@contextmanager
def _variant_of(blocks: int) -> Iterator[None]:
    """The variant with so many blocks, for the methods."""
    found = get_variant(VARIANT)
    fewer = replace(found, transformer=replace(found.transformer, depth=blocks))
    with patch.object(full, "get_variant", lambda name: fewer):
        yield


def _work(case: Case) -> Workload:
    dtype = torch.bfloat16 if case.method == "lora" and case.precision == "bf16" else torch.float32
    return Workload(Size(case.pixels, case.blocks), dtype, case.device)


def _random_file(case: Case, folder: Path) -> Path:
    save_file(_work(case).weights, folder / "random.safetensors")
    return folder / "random.safetensors"


def _plain(case: Case) -> Callable[[], Any]:
    """As diffusers' and PixArt's own training scripts: diffusers' transformer, captions padded to 300 tokens, peft, autocast."""
    from diffusers import DDPMScheduler

    work = _work(case)
    model = diffusers_model(work).train()
    del work.weights
    if case.method == "lora":
        _add_lora(model)
    else:
        model.requires_grad_(True)
    if case.checkpointed:
        model.enable_gradient_checkpointing()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = _plain_optimizer(case.optimizer, trained)
    schedule = DDPMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    made = RandomSource(case).made.to(torch.device(case.device))
    context, mask = _padded(made)
    added = {"resolution": None, "aspect_ratio": None}
    wrapped = autocast(case.device, torch.bfloat16) if case.precision == "bf16" else nullcontext()

    def update() -> None:
        noise = torch.randn_like(made.latent)
        timestep = torch.randint(0, 1000, (case.batch,), device=case.device)
        noisy = schedule.add_noise(made.latent, noise, timestep)
        with wrapped:
            predicted = model(
                noisy, encoder_hidden_states=context, timestep=timestep, encoder_attention_mask=mask, added_cond_kwargs=added, return_dict=False
            )[0]
        nn.functional.mse_loss(predicted.chunk(2, dim=1)[0].float(), noise).backward()
        norm = nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        float(norm)  # as loops log it

    return update


def _add_lora(model: nn.Module) -> None:
    """Frozen weights in the precision, adapters in fp32, as diffusers' scripts have them."""
    from peft import LoraConfig, inject_adapter_in_model

    model.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=PLAIN_TARGETS), model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _plain_optimizer(name: str, trained: list[nn.Parameter]) -> torch.optim.Optimizer:
    """With torch's and the libraries' own defaults, as scripts use them."""
    if name == "adamw":
        return torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    if name == "adamw8bit":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(trained, lr=RATE, weight_decay=0.0)
    import pytorch_optimizer

    classes = {"came": "CAME", "prodigy": "Prodigy"}
    if name not in classes:
        raise ValueError(f"The plain loop has no optimizer {name!r}; expected adamw, adamw8bit, came or prodigy.")
    return getattr(pytorch_optimizer, classes[name])(trained, lr=RATE)


def _padded(made: Batch) -> tuple[Tensor, Tensor]:
    """Captions and their mask at the length that diffusers' pipeline always has."""
    missing = PADDED - made.mask.shape[1]
    context = nn.functional.pad(made.context, (0, 0, 0, missing))
    return context, nn.functional.pad(made.mask.float(), (0, missing))
