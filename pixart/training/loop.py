"""The training loop, on plain accelerate: one process, or several with torchrun.

It knows neither what is trained (methods), nor what a step computes (objectives), nor where pictures come from (sources).
"""
from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ConfigError, UnsupportedError
from ..sampling_note import note_of
from .average import Average
from .base import file_mark
from .batch import Batch, drop_captions
from .blocks import wrap_blocks
from .contents import check_contents, contents_mark
from .draws import Draws, share
from .heap import give_back_freed_memory
from .precision import autocast, make_scaler
from .processes import agreed, check_batches, make_accelerator
from .recipe import Recipe
from .samples import Sampler
from .shard import gathered, shard_model, whole_tensors
from .state import read_info, read_tensors, stored_tensors, write_state
from .trained import Trained
from .validation import validation_losses
from .watch import Watch

MAX_SKIPPED = 20


class Loop:
    """Network, optimizers, average and data of one run."""

    def __init__(self, recipe: Recipe, state: Path | None = None) -> None:
        """state: where its pictures must be those of this recipe's source; see `resume`."""
        self.recipe = recipe
        self.accelerator = make_accelerator(recipe)
        self.device = self.accelerator.device
        check_batches(recipe, self.accelerator.num_processes)
        self.source = recipe.source.make(recipe)
        self.method = recipe.method.make(recipe)
        self.objective = recipe.objective.make()
        self.objective.check_run(recipe, self.source)
        self.method.config()  # tells what is wrong with the settings and the first weights, before hours of computing features
        if recipe.initialize:
            with torch.device("meta"):
                self.method.build(self.source, torch.device("meta"))
        if state is not None and self.source.settled:
            check_contents(Path(recipe.run_dir), read_info(state).get("contents"), self.source.contents())
        torch.manual_seed(recipe.seed)
        prompts = (*recipe.samples.prompts, recipe.samples.negative) if recipe.samples else ()
        self.source.prepare(prompts, self.accelerator)  # before the network is in memory: the text encoder and the VAE are large
        self.contents = self.source.contents()
        self.network = self.method.build(self.source, self.device)
        self.scaler = make_scaler(recipe.precision, self.device)
        self._build()
        self.step = 0
        self._skipped = 0
        self._stop_asked = False

    def _build(self) -> None:
        """The networks as they are trained: compiled, checkpointed, shared among the processes, with optimizers and average.

        The objective comes first: what it copies are plain networks.
        """
        recipe = self.recipe
        model = self.objective.wrap(self.network, self.source).to(self.device)
        beside = self.objective.companions()
        for network in (self.network, *beside.values()):
            wrap_blocks(self.method.blocks(network), compiled=recipe.compile_blocks, checkpointed=recipe.checkpoint_blocks)
            if recipe.trim_memory and self.device.type == "cpu":
                give_back_freed_memory(self.method.blocks(network))
        self.trained = Trained(model, self.method.blocks(self.network), recipe, self.accelerator, self.scaler)
        self.companions: dict[str, Trained] = {}
        for name, network in beside.items():
            if any(parameter.requires_grad for parameter in network.parameters()):
                self.companions[name] = Trained(network, self.method.blocks(network), recipe, self.accelerator, self.scaler)
            elif recipe.shard:
                shard_model(network, list(self.method.blocks(network)), self.device)
        self.average = Average(self.network, recipe.ema_decay)
        self.bare_model, self.optimizers = self.trained.bare, self.trained.optimizers

    def ask_to_stop(self, *_: object) -> None:
        """The run ends after the step it is in; several processes agree on which."""
        self._stop_asked = True

    # -- running ---------------------------------------------------------------------------------

    def run(self, stop_after: float | None = None) -> None:
        """Steps until the recipe ends, or until it is asked to stop; then saves."""
        recipe = self.recipe
        watch = Watch(recipe, self.step, self.accelerator)
        saved = None
        try:
            while self.step < recipe.steps:
                number, _ = recipe.stage_at(self.step)
                values = self._train_step()
                self.step += 1
                watch.step(self.step, recipe.stages[number], values)
                self._look(number, watch)
                if self.step % recipe.save_every == 0:
                    self.save()
                    watch.plot()
                    saved = self.step
                if agreed(self._stop_asked or (stop_after is not None and watch.seconds > stop_after), self.accelerator):
                    break
            if saved != self.step:
                self.save()
        finally:
            watch.close()

    def say_where_it_stopped(self) -> None:
        """A line for whoever stopped a run, on stderr; a finished one needs none."""
        if self.step < self.recipe.steps and self.accelerator.is_main_process:
            sys.stderr.write(f"Stopped after step {self.step} of {self.recipe.steps}; the same command resumes.\n")

    def _look(self, stage: int, watch: Watch) -> None:
        """Validation and sample pictures where they are due, with the averaged weights."""
        recipe, last = self.recipe, self.step == self.recipe.steps
        validate = recipe.validation_every is not None and (self.step % recipe.validation_every == 0 or last)
        draw = recipe.samples is not None and (self.step % recipe.samples.every == 0 or last)
        if not validate and not draw:
            return
        training = self.bare_model.training
        self.bare_model.eval()
        with torch.no_grad(), self.average.applied():
            if validate:
                watch.validation(self.step, validation_losses(self, stage))
            if draw and (self.accelerator.is_main_process or recipe.shard):  # sharded weights need every process
                sampler = Sampler(recipe, self.method, self.source, note_of(self._facts(self.step - 1)))  # of the stage
                sheet = sampler.sheet(self.network, stage, self.device)
                watch.picture(self.step, sheet)
        self.bare_model.train(training)

    def _train_step(self) -> dict[str, float]:
        """One update from one batch, each process computing its share in `accumulation` parts; companions have their turns before."""
        number, _ = self.recipe.stage_at(self.step)
        settings, parts = self.recipe.part_at("objective", number).settings, self._parts(number)
        turns = self.objective.turns(settings)
        parts = list(parts) if turns else parts  # each turn sees the same captions
        rate, finite = self.recipe.learning_rate(self.step), True
        beside: dict[str, Tensor] = {}
        shown: dict[str, Tensor] = {}
        for turn in turns:
            companion, losses = self.companions[turn.companion], partial(self.objective.companion_losses, turn, settings)
            sound = bool(torch.isfinite(self._backward(companion, losses, parts, beside)))
            companion.step(rate * turn.rate, sound)
            finite = finite and sound
        norm = self._backward(self.trained, partial(self.objective.losses, settings), parts, shown)
        self._update(finite and bool(torch.isfinite(norm)))
        values = torch.stack([*shown.values(), *(value / len(turns) for value in beside.values())])
        means = dict(zip([*shown, *beside], self.accelerator.reduce(values, reduction="mean").tolist(), strict=True))
        return {"loss": sum(means[name] for name in shown), **means, "grad_norm": float(norm)}

    def _parts(self, number: int) -> Iterator[tuple[Draws, Batch]]:
        """This process's rows of the step's batch, in parts."""
        _, inside = self.recipe.stage_at(self.step)
        stage, process = self.recipe.stages[number], self.accelerator.process_index
        rows = share(stage.batch_size, process, self.accelerator.num_processes)
        for part in range(stage.accumulation):
            chosen = share(len(rows), part, stage.accumulation)
            draws = Draws(self.recipe.seed, number, inside, rows[chosen.start : chosen.stop])
            yield draws, self.source.batch(self.recipe.part_at("source", number).settings, stage, draws)

    def _backward(
        self, trained: Trained, losses: Callable[..., dict[str, Tensor]], parts: Iterable[tuple[Draws, Batch]], shown: dict[str, Tensor]
    ) -> Tensor:
        """The clipped gradients of a batch; returns their norm, and adds this process's mean losses to `shown`."""
        count = self.recipe.stages[self.recipe.stage_at(self.step)[0]].accumulation
        for index, (draws, batch) in enumerate(parts):
            torch.manual_seed(int(draws.of_row(draws.rows.start, "modules").integers(2**63)))  # for what draws by itself: dropout
            batch = self._with_dropped(batch.to(self.device), draws)
            with trained.gradients(last=index == count - 1):
                with autocast(self.recipe.precision, self.device):
                    found = losses(trained.model, self.method.conditions(self.network, batch), batch, draws)
                # Over the pictures of all processes, whose gradients are averaged afterwards.
                means = {
                    name: (loss * batch.weight).sum() * self.accelerator.num_processes / batch.total for name, loss in found.items()
                }
                self.scaler.scale(sum(means.values())).backward()
            for name, mean in means.items():
                shown[name] = shown.get(name, 0) + mean.detach()
        return trained.clip()

    def _with_dropped(self, batch: Batch, draws: Draws) -> Batch:
        recipe = self.recipe
        if not recipe.caption_dropout:
            return batch
        keep = recipe.dropped_mask == "caption"
        null = self.method.null_rows(self.network) if keep else self.source.null_context
        if null is None and keep:
            raise ConfigError("These weights bring no null caption (y_embedding); choose dropped_mask 'empty'.")
        if null is None:
            raise ConfigError("No text encoder was given, which makes the empty caption; give --text-encoder, or set caption_dropout to 0.")
        return drop_captions(batch, null, recipe.caption_dropout, keep, draws)

    def _update(self, finite: bool) -> None:
        """One step of the optimizers and the average; gradients that are not finite are skipped, and many are an error."""
        self._skipped = 0 if finite else self._skipped + 1
        if self._skipped > MAX_SKIPPED:
            raise UnsupportedError(
                f"{self._skipped} steps in a row before step {self.step} had gradients that are not finite. The last good state is "
                f"kept in {self.recipe.run_dir}; lower the learning rate, or train with precision fp32."
            )
        self.trained.step(self.recipe.learning_rate(self.step), finite)
        if finite:
            self.average.update()
            self.objective.after_update(self.average)

    # -- keeping ---------------------------------------------------------------------------------

    def _facts(self, step: int) -> dict[str, str]:
        """What the objective says of weights that a step has made, by its stage."""
        number, _ = self.recipe.stage_at(max(0, min(step, self.recipe.steps - 1)))
        return self.objective.metadata(self.recipe.part_at("objective", number).settings)

    def save(self) -> None:
        """Writes the state to go on from, then the averaged weights; each appears whole."""
        recipe, main = self.recipe, self.accelerator.is_main_process
        info = {
            "recipe": recipe.to_dict(), "base": file_mark(recipe.initialize), "contents": contents_mark(self.contents),
            "skipped": self._skipped, "optimizers": self.trained.values(), "scaler": self.scaler.state_dict(),
            "companions": {name: companion.values() for name, companion in self.companions.items()},
        }  # fmt: skip
        write_state(Path(recipe.run_dir), self.step, self._tensors(), info)
        averages = whole_tensors(self.average.values, keep=main)
        with gathered(self.network, keep=main):
            if main:
                metadata = {"step": str(self.step), "license": "Apache-2.0", **self._facts(self.step - 1)}
                self.method.write(self.network, averages, Path(recipe.output), metadata)
        self.accelerator.wait_for_everyone()

    def resume(self, folder: Path, accept_changes: bool = False) -> None:
        """Goes on from a state; raises ConfigError where the pictures have changed since. `check_places` has looked at the recipe."""
        info = read_info(folder)
        if not accept_changes:
            check_contents(Path(self.recipe.run_dir), info.get("contents"), self.contents)
            self._skipped = int(info.get("skipped", 0))
        stored = stored_tensors(folder)
        self.trained.prepare(stored, info.get("optimizers", {}))
        for name, companion in self.companions.items():
            start = f"companion.{name}."
            own = {key.removeprefix(start): value for key, value in stored.items() if key.startswith(start)}
            companion.prepare(own, info.get("companions", {}).get(name, {}))
        read_tensors(folder, self._tensors())
        if info.get("scaler") and self.scaler.is_enabled():
            self.scaler.load_state_dict(info["scaler"])
        self.step = info["step"]

    def _tensors(self) -> dict[str, Tensor]:
        """Everything that a run changes, by name."""
        average = {f"average.{name}": value for name, value in self.average.values.items()} if self.average.decay else {}
        own = {f"objective.{name}": value for name, value in self.objective.state().items()}
        beside = {f"companion.{name}.{key}": value for name, each in self.companions.items() for key, value in each.tensors().items()}
        return {**self.trained.tensors(), **average, **own, **beside}
