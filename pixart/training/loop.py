"""The training loop, on plain accelerate: one process, or several with torchrun."""
from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from ..attention import dense_attention, torch_attention
from ..checkpoints.hints import NOTE_KEY
from ..config import get_variant
from ..errors import ConfigError, UnsupportedError
from ..logs import get_logger
from ..model import PixArtTransformer
from .alignment import AlignedTransformer, alignment_loss
from .compression import begin_compression
from .data import Batch, bucket_sizes, draw_buckets, make_source
from .diffusion import STEPS, NoiseSchedule, sample_timesteps, training_loss
from .initialize import copy_weights, initialize_weights, pass_noise_through
from .optimizer import make_optimizers
from .recipe import Recipe, load_recipe

logger = get_logger(__name__)
LOG_EVERY = 25
MAX_SKIPPED = 20


def train(config_path: str | Path, resume: bool = True, stop_after: float | None = None) -> Path:
    """Runs a recipe and returns the path of its EMA weights.

    The full state is kept in the recipe's `run_dir`; with `resume` a run goes on from there, else it
    begins anew. `stop_after`: seconds after which it saves and stops early.
    """
    trainer = make_trainer(load_recipe(config_path))
    if resume:
        trainer.resume()
    with _signals(trainer.ask_to_stop):
        trainer.run(stop_after)
    trainer.save()
    return Path(trainer.recipe.output)


def make_trainer(recipe: Recipe) -> Trainer:
    """The trainer of a transformer, or of a ControlNet beside one."""
    if not recipe.control_blocks:
        return Trainer(recipe)
    from .controlnet import ControlTrainer  # it is a Trainer, so it imports this module

    return ControlTrainer(recipe)


@contextmanager
def _signals(handler: Callable[..., None]) -> Iterator[None]:
    """Ctrl-C and termination end a run after its step, so that what was learned is kept whole."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


class Trainer:
    """Model, optimizers, EMA and data of one run."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        on_cpu = not torch.cuda.is_available()
        self.accelerator = Accelerator(mixed_precision=recipe.precision, cpu=on_cpu)
        torch.manual_seed(recipe.seed)
        self.source = make_source(recipe)
        self.transformer = self._new_model().to(self.accelerator.device)
        self.ema = AveragedModel(self.transformer, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema_decay))
        model: nn.Module = self.transformer
        if recipe.align_weight:
            if not getattr(self.source, "feature_count", 0):
                raise ConfigError(f"The data source {recipe.source!r} knows no features of tokens; leave out align_weight.")
            model = AlignedTransformer(model, recipe.align_block, self.source.feature_count).to(self.accelerator.device)
        optimizers = make_optimizers(model, self.transformer, recipe)
        self.model, *self.optimizers = self.accelerator.prepare(model, *optimizers)
        self.schedule = NoiseSchedule(self.accelerator.device)
        self.step = 0
        self._skipped = 0
        self._stop_asked = False

    def _new_model(self) -> PixArtTransformer:
        attention = dense_attention if self.accelerator.device.type == "cpu" else torch_attention
        config = get_variant(self.recipe.variant).transformer
        if self.recipe.compressed_blocks:
            config = replace(config, compressed_blocks=self.recipe.compressed_blocks)
        model = PixArtTransformer(config, attention=attention)
        new = [block for block, _ in config.compressed_blocks]  # blocks whose compression begins here
        if self.recipe.initialize:
            new = copy_weights(model, self.recipe.initialize, self.recipe.variant)
        else:
            initialize_weights(model)
            if self.recipe.pass_noise:
                pass_noise_through(model)
        if new:
            begin_compression(model, new, self._probe())
        if self.recipe.compile_blocks:  # one graph serves every block and size; over twice as fast on a CPU
            for block in model.blocks:
                block.compile(dynamic=True)
        return model

    def _probe(self, count: int = 16) -> tuple[Tensor, ...]:
        """Arguments of a forward on noisy pictures at timesteps from 0 to 999, to measure a model with."""
        stage = self.recipe.stages[-1]
        batch = self.source.batch((stage.base_size, stage.base_size), count, np.random.default_rng(self.recipe.seed))
        timestep = torch.linspace(0, STEPS - 1, count).long()
        noise = torch.randn(batch.latent.shape, generator=torch.Generator().manual_seed(self.recipe.seed))
        noisy = NoiseSchedule().add_noise(batch.latent, noise, timestep)
        return noisy, timestep, batch.context, batch.mask

    @property
    def _bare_model(self) -> nn.Module:
        """The transformer, within its alignment head if there is one."""
        return self.accelerator.unwrap_model(self.model)

    def ask_to_stop(self, *_: object) -> None:
        """The run ends after the step it is in; several processes agree on which."""
        self._stop_asked = True

    # -- running ---------------------------------------------------------------------------------

    def run(self, stop_after: float | None = None) -> None:
        """Steps until the recipe ends."""
        begin, rank = time.monotonic(), self.accelerator.process_index
        rng = np.random.default_rng([self.recipe.seed, rank, self.step])
        shared_rng = np.random.default_rng([self.recipe.seed, self.step])  # every process draws the same sizes
        noise = torch.Generator().manual_seed(self.recipe.seed + 1000 * self.step + rank)
        progress = tqdm(total=self.recipe.steps, initial=self.step, disable=rank != 0, desc="train", mininterval=5)
        stage, buckets, losses = None, None, []
        while self.step < self.recipe.steps:
            if stage is not self.recipe.stage_at(self.step)[0]:
                stage = self.recipe.stage_at(self.step)[0]
                base = get_variant(self.recipe.variant).base_size
                buckets = draw_buckets(bucket_sizes(base, stage.base_size), shared_rng, stage.square_share)
            losses.append(self._train_step(stage, next(buckets), rng, noise))
            self.step += 1
            progress.update()
            if self.step % LOG_EVERY == 0:
                self._log(losses, stage, time.monotonic() - begin, progress)
                losses = []
            if self.step % self.recipe.save_every == 0:
                self.save()
            late = stop_after is not None and time.monotonic() - begin > stop_after
            if self._agreed(late or self._stop_asked):
                break
        progress.close()

    def _train_step(self, stage, size, rng, noise_generator) -> tuple[float, ...]:
        device = self.accelerator.device
        batch = self.source.batch(size, max(1, stage.batch_size // self.accelerator.num_processes), rng)
        latent = batch.latent.to(device)
        timestep = sample_timesteps(len(latent), stage.timestep_mean, stage.timestep_std, noise_generator).to(device)
        noise = torch.randn(latent.shape, generator=noise_generator).to(device)
        noisy = self.schedule.add_noise(latent, noise, timestep)
        with self.accelerator.autocast():
            prediction = self.model(noisy, timestep, *self._inputs(batch))
        aligned: list[Tensor] = []
        if self.recipe.align_weight:
            prediction, read = prediction
            aligned.append(self.recipe.align_weight * alignment_loss(read, batch.features.to(device)))
        losses = training_loss(self.schedule, prediction, latent, noise, timestep, self.recipe.max_loss_weight)
        self.accelerator.backward(sum((*losses, *aligned)))
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        self._update(bool(torch.isfinite(norm)))
        return losses[0].item(), losses[1].item(), float(norm), *(loss.item() for loss in aligned)

    def _inputs(self, batch: Batch) -> tuple[Tensor | None, ...]:
        """What the model is told of a batch beside the noisy latent and its timestep."""
        device = self.accelerator.device
        pixels = batch.size.to(device) if self.transformer.config.micro_condition else None
        return batch.context.to(device), batch.mask.to(device), pixels

    def _trained(self, module: nn.Module) -> nn.Module:
        """The part of the transformer that is written."""
        return module

    def _update(self, finite: bool) -> None:
        """One step of the optimizers and the EMA; gradients that are not finite are skipped, and many are an error."""
        self._skipped = 0 if finite else self._skipped + 1
        if self._skipped > MAX_SKIPPED:
            raise UnsupportedError(
                f"{self._skipped} steps in a row before step {self.step} had gradients that are not finite. The weights "
                'from before them are kept; lower the learning rate, or train with precision "no" (fp32).'
            )
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.recipe.learning_rate(self.step)
            if finite:
                optimizer.step()
            optimizer.zero_grad()
        if finite:
            self.ema.update_parameters(self.transformer)

    def _agreed(self, flag: bool) -> bool:
        """True in every process once any says so; all must leave the loop at the same step."""
        if self.accelerator.num_processes == 1:
            return flag
        votes = torch.tensor([float(flag)], device=self.accelerator.device)
        return self.accelerator.reduce(votes, reduction="sum").item() > 0

    # -- keeping ---------------------------------------------------------------------------------

    @property
    def _state_path(self) -> Path:
        return Path(self.recipe.run_dir) / "state.pt"

    def save(self) -> None:
        """Writes the EMA weights and the full state, each replaced whole."""
        if not self.accelerator.is_main_process:
            return
        weights = {k: v.half().cpu().contiguous() for k, v in self._trained(self.ema.module).state_dict().items()}
        metadata = {"format": "pt", "step": str(self.step), "license": "Apache-2.0", NOTE_KEY: json.dumps({"ema": True})}
        output = Path(self.recipe.output)
        output.parent.mkdir(parents=True, exist_ok=True)
        self._replace(output, lambda path: save_file(weights, path, metadata=metadata))
        state = {
            "step": self.step,
            "model": self._bare_model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        self._state_path.parent.mkdir(parents=True, exist_ok=True)
        self._replace(self._state_path, lambda path: torch.save(state, path))

    @staticmethod
    def _replace(path: Path, write) -> None:
        partial = path.with_name(path.name + ".partial")
        write(partial)
        partial.chmod(0o644)  # safetensors writes files that only their owner can read
        partial.replace(path)

    def resume(self) -> None:
        """Goes on from `run_dir`, if a state is there."""
        if not self._state_path.exists():
            return
        state = torch.load(self._state_path, map_location="cpu", weights_only=True)  # each loader moves what is its own
        self._bare_model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        self.step = state["step"]
        self.progress_note(f"resuming at step {self.step}")

    def _log(self, losses: list[tuple[float, ...]], stage, seconds: float, progress: tqdm) -> None:
        if not self.accelerator.is_main_process:
            return
        noise, variance, norm, *aligned = np.mean(losses, axis=0)
        progress.set_postfix(noise=f"{noise:.4f}", variance=f"{variance:.4f}", norm=f"{norm:.2f}")
        row = {
            "step": self.step, "base_size": stage.base_size, "noise_loss": round(float(noise), 5),
            "variance_loss": round(float(variance), 5), "grad_norm": round(float(norm), 4), "seconds": round(seconds, 1),
        }
        if aligned:
            row["align_loss"] = round(float(aligned[0]), 5)
        path = Path(self.recipe.run_dir) / "log.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def progress_note(self, text: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(text)
