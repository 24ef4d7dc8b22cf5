"""The training loop, on plain accelerate: one process, or several with torchrun.

It knows neither what is trained (methods), nor what a step computes (objectives), nor where pictures come from (sources).
"""
from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import ConfigError, UnsupportedError
from .average import Average
from .base import file_mark
from .batch import Batch, drop_captions
from .blocks import wrap_blocks
from .contents import check_contents, contents_mark, keep_contents
from .draws import Draws, share
from .dry_run import describe_run
from .linear import cast_weights_anew
from .optimizer_state import optimizer_tensors, optimizer_values, prepare_optimizers
from .optimizers import make_optimizers
from .precision import autocast, make_scaler
from .processes import agreed, check_batches, make_accelerator, stopped_by_signals
from .recipe import Recipe, Stage, check_given, load_recipe
from .samples import Sampler
from .shard import gathered, shard_model, whole_tensor, whole_tensors
from .state import check_same, clear_run, newest_state, read_info, read_tensors, stored_tensors, write_state
from .validation import validation_losses
from .watch import Watch

MAX_SKIPPED = 20


def train(
    path: str | Path,
    changes: Sequence[str] = (),
    *,
    overwrite: bool = False,
    accept_changes: bool = False,
    stop_after: float | None = None,
) -> Path:
    """Runs a recipe, from its last state if there is one, and returns the path of its averaged weights.

    changes: of `load_recipe`. overwrite: begin anew, over a former run and its output. accept_changes: go on although the
    recipe differs from the one that the state was made with. stop_after: seconds after which it saves and stops early.
    """
    recipe = load_recipe(path, changes)
    check_given(recipe)
    run_dir, output = Path(recipe.run_dir), Path(recipe.output)
    state = None if overwrite else newest_state(run_dir)
    if output.exists() and not overwrite and (state is None or not _wrote(state, output)):
        raise ConfigError(
            f"{output} exists, and {run_dir} has no state of its run to go on from. --overwrite replaces it, --output writes elsewhere."
        )
    loop = Loop(recipe)
    if state is not None:
        loop.resume(state, accept_changes)
    if loop.accelerator.is_main_process:
        if state is None:
            clear_run(run_dir)
        keep_contents(run_dir, loop.contents)
    loop.accelerator.wait_for_everyone()
    with stopped_by_signals(loop.ask_to_stop):
        loop.run(stop_after)
    return output


def dry_run(path: str | Path, changes: Sequence[str] = ()) -> list[str]:
    """What `train` would do, as lines; no weights are loaded and nothing is written."""
    recipe = load_recipe(path, changes)
    check_given(recipe)
    accelerator = make_accelerator(recipe)
    check_batches(recipe, accelerator.num_processes)
    return describe_run(recipe, accelerator)


def _wrote(state: Path, output: Path) -> bool:
    """Whether the run of a state writes to `output`."""
    return Path(str(read_info(state)["recipe"].get("output"))).resolve() == output.resolve()


class Loop:
    """Network, optimizers, average and data of one run."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.accelerator = make_accelerator(recipe)
        self.device = self.accelerator.device
        check_batches(recipe, self.accelerator.num_processes)
        torch.manual_seed(recipe.seed)
        self.source = recipe.source.make(recipe)
        self.method = recipe.method.make(recipe)
        self.objective = recipe.objective.make()
        prompts = (*recipe.samples.prompts, recipe.samples.negative) if recipe.samples else ()
        self.source.prepare(prompts, self.accelerator)  # before the network is in memory: the text encoder and the VAE are large
        self.contents = self.source.contents()
        self.network = self.method.build(self.source, self.device)
        self._build()
        self.scaler = make_scaler(recipe.precision, self.device)
        self.step = 0
        self._skipped = 0
        self._stop_asked = False

    def _build(self) -> None:
        """The network as it is trained: compiled, checkpointed, shared among the processes, with optimizers and average."""
        recipe, blocks = self.recipe, list(self.method.blocks(self.network))
        wrap_blocks(blocks, compiled=recipe.compile_blocks, checkpointed=recipe.checkpoint_blocks)
        model = self.objective.wrap(self.network, self.source).to(self.device)
        if recipe.precision != "fp32" and not (recipe.compile_blocks or recipe.checkpoint_blocks or recipe.shard):
            cast_weights_anew(model)  # with the others no copy outlives its block
        if recipe.shard:
            shard_model(model, blocks, self.device)
        self.model = model if recipe.shard else self.accelerator.prepare(model)
        self.optimizers = make_optimizers(model, blocks, recipe)
        self.average = Average(self.network, recipe.ema_decay)
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.bare_model = model

    def ask_to_stop(self, *_: object) -> None:
        """The run ends after the step it is in; several processes agree on which."""
        self._stop_asked = True

    # -- running ---------------------------------------------------------------------------------

    def run(self, stop_after: float | None = None) -> None:
        """Steps until the recipe ends, or until it is asked to stop; then saves."""
        recipe = self.recipe
        watch = Watch(recipe, self.step, self.accelerator)
        sampler = Sampler(recipe, self.method, self.source) if recipe.samples else None
        saved = None
        try:
            while self.step < recipe.steps:
                number, _ = recipe.stage_at(self.step)
                values = self._train_step()
                self.step += 1
                watch.step(self.step, recipe.stages[number], values)
                self._look(number, watch, sampler)
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

    def _look(self, stage: int, watch: Watch, sampler: Sampler | None) -> None:
        """Validation and sample pictures where they are due, with the averaged weights."""
        recipe, last = self.recipe, self.step == self.recipe.steps
        validate = recipe.validation_every is not None and (self.step % recipe.validation_every == 0 or last)
        draw = sampler is not None and (self.step % recipe.samples.every == 0 or last)
        if not validate and not draw:
            return
        training = self.bare_model.training
        self.bare_model.eval()
        with torch.no_grad(), self.average.applied():
            if validate:
                watch.validation(self.step, validation_losses(self, stage))
            if draw and (self.accelerator.is_main_process or recipe.shard):  # sharded weights need every process
                sheet = sampler.sheet(self.network, stage, self.device)
                watch.picture(self.step, sheet)
        self.bare_model.train(training)

    def _train_step(self) -> dict[str, float]:
        """One update from one batch, each process computing its share in `accumulation` parts."""
        number, inside = self.recipe.stage_at(self.step)
        stage, process = self.recipe.stages[number], self.accelerator.process_index
        rows = share(stage.batch_size, process, self.accelerator.num_processes)
        parts = [share(len(rows), part, stage.accumulation) for part in range(stage.accumulation)]
        shown: dict[str, Tensor] = {}
        for part in parts:
            draws = Draws(self.recipe.seed, number, inside, rows[part.start : part.stop])
            with self._gradients(last=part is parts[-1]):
                for name, mean in self._backward(number, stage, draws).items():
                    shown[name] = shown.get(name, 0) + mean
        norm = self._clip()
        self._update(bool(torch.isfinite(norm)))
        means = self.accelerator.reduce(torch.stack(list(shown.values())), reduction="mean").tolist()
        return {"loss": sum(means), **dict(zip(shown, means, strict=True)), "grad_norm": float(norm)}

    def _backward(self, number: int, stage: Stage, draws: Draws) -> dict[str, Tensor]:
        """Adds the gradients of some rows; returns their shares of the batch's mean losses, detached."""
        torch.manual_seed(int(draws.of_row(draws.rows.start, "modules").integers(2**63)))  # for what draws by itself, such as dropout
        batch = self.source.batch(self.recipe.part_at("source", number).settings, stage, draws).to(self.device)
        batch = self._with_dropped(batch, draws)
        settings = self.recipe.part_at("objective", number).settings
        with autocast(self.recipe.precision, self.device):
            losses = self.objective.losses(settings, self.model, self.method.conditions(self.network, batch), batch, draws)
        # Over the pictures of all processes, whose gradients are averaged afterwards.
        means = {name: (loss * batch.weight).sum() * self.accelerator.num_processes / batch.total for name, loss in losses.items()}
        self.scaler.scale(sum(means.values())).backward()
        return {name: mean.detach() for name, mean in means.items()}

    def _gradients(self, last: bool) -> AbstractContextManager:
        """Processes exchange gradients with the last part of a batch alone."""
        if self.recipe.shard:
            self.model.set_requires_gradient_sync(last)
            return nullcontext()
        return nullcontext() if last else self.accelerator.no_sync(self.model)

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

    def _clip(self) -> Tensor:
        """The norm of all gradients before they are clipped."""
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        parameters = [parameter for parameter in self.bare_model.parameters() if parameter.grad is not None]
        limit = self.recipe.clip_norm or float("inf")
        return whole_tensor(nn.utils.clip_grad_norm_(parameters, limit))

    def _update(self, finite: bool) -> None:
        """One step of the optimizers and the average; gradients that are not finite are skipped, and many are an error."""
        self._skipped = 0 if finite else self._skipped + 1
        if self._skipped > MAX_SKIPPED:
            raise UnsupportedError(
                f"{self._skipped} steps in a row before step {self.step} had gradients that are not finite. The last good state is "
                f"kept in {self.recipe.run_dir}; lower the learning rate, or train with precision fp32."
            )
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.recipe.learning_rate(self.step)
            if finite:
                self.scaler.step(optimizer)
            optimizer.zero_grad()
        if self.scaler.is_enabled():
            self.scaler.update()
        if finite:
            self.average.update()
            self.objective.after_update(self.average)

    # -- keeping ---------------------------------------------------------------------------------

    def save(self) -> None:
        """Writes the state to go on from, then the averaged weights; each appears whole."""
        recipe, main = self.recipe, self.accelerator.is_main_process
        info = {
            "recipe": recipe.to_dict(), "base": file_mark(recipe.initialize), "contents": contents_mark(self.contents),
            "skipped": self._skipped,
            "optimizers": optimizer_values(self.optimizers, self.names), "scaler": self.scaler.state_dict(),
        }  # fmt: skip
        write_state(Path(recipe.run_dir), self.step, self._tensors(), info)
        averages = whole_tensors(self.average.values, keep=main)
        with gathered(self.network, keep=main):
            if main:
                self.method.write(self.network, averages, Path(recipe.output), {"step": str(self.step), "license": "Apache-2.0"})
        self.accelerator.wait_for_everyone()

    def resume(self, folder: Path, accept_changes: bool = False) -> None:
        """Goes on from a state; raises ConfigError where the recipe or the file that it starts from has changed since."""
        info = read_info(folder)
        if not accept_changes:
            now = {**self.recipe.to_dict(), "content of initialize": file_mark(self.recipe.initialize)}
            check_contents(Path(self.recipe.run_dir), info.get("contents"), self.contents)
            check_same(folder, {**info["recipe"], "content of initialize": info.get("base")}, now)
            self._skipped = int(info.get("skipped", 0))
        prepare_optimizers(self.optimizers, self.names, stored_tensors(folder), info.get("optimizers", {}))
        read_tensors(folder, self._tensors())
        if info.get("scaler") and self.scaler.is_enabled():
            self.scaler.load_state_dict(info["scaler"])
        self.step = info["step"]

    def _tensors(self) -> dict[str, Tensor]:
        """Everything that a run changes, by name."""
        trained = {f"network.{name}": value.detach() for name, value in self.bare_model.named_parameters() if value.requires_grad}
        average = {f"average.{name}": value for name, value in self.average.values.items()} if self.average.decay else {}
        own = {f"objective.{name}": value for name, value in self.objective.state().items()}
        return {**trained, **average, **own, **optimizer_tensors(self.optimizers, self.names)}
