"""The training loop, on plain accelerate: one process, or several with torchrun.

It knows neither what is trained (methods), nor what a step computes (objectives), nor where pictures come from (sources).
"""
from __future__ import annotations

import hashlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..errors import ConfigError, UnsupportedError
from .average import Average
from .batch import Batch, drop_captions
from .companions import Companions
from .draws import Draws, share
from .optimizers import make_optimizers
from .recipe import Recipe, load_recipe
from .state import check_same, newest_state, optimizer_tensors, prepare_optimizers, read_info, read_tensors, stored_shapes, write_state
from .watch import Watch

MAX_SKIPPED = 20
HASHED_BYTES = 1 << 20  # from each end of the file that a run starts from


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
    run_dir, output = Path(recipe.run_dir), Path(recipe.output)
    state = None if overwrite else newest_state(run_dir)
    if state is None and output.exists() and not overwrite:
        raise ConfigError(f"{output} exists, and {run_dir} has no state to go on from. --overwrite replaces it, --output writes elsewhere.")
    loop = Loop(recipe)
    if state is not None:
        loop.resume(state, accept_changes)
    elif overwrite and loop.accelerator.is_main_process:
        (run_dir / "log.jsonl").unlink(missing_ok=True)
    with _signals(loop.ask_to_stop):
        loop.run(stop_after)
    return output


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


class Loop:
    """Network, optimizers, average and data of one run."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.accelerator = Accelerator(mixed_precision=recipe.precision, cpu=not torch.cuda.is_available())
        self._check_batches()
        torch.manual_seed(recipe.seed)
        self.source = recipe.source.make(recipe)
        self.method = recipe.method.make(recipe)
        self.objective = recipe.objective.make()
        self.network = self.method.build(self.source, self.accelerator.device)
        model = self.objective.wrap(self.network, self.source).to(self.accelerator.device)
        if recipe.compile_blocks:  # one graph serves every block and size; over twice as fast on a CPU
            for network in (self.network, *self.objective.companions().values()):
                for block in self.method.blocks(network):
                    block.compile(dynamic=True)
        optimizers = make_optimizers(model, self.method.blocks(self.network), recipe)
        self.model, *self.optimizers = self.accelerator.prepare(model, *optimizers)
        self.average = Average(self.network, recipe.ema_decay)
        self.companions = Companions(self.objective, self.method, recipe, self.accelerator)
        self.step = 0
        self._skipped = 0
        self._stop_asked = False

    def _check_batches(self) -> None:
        processes = self.accelerator.num_processes
        for number, stage in enumerate(self.recipe.stages):
            if stage.batch_size % processes:
                raise ConfigError(
                    f"Stage {number}: a batch of {stage.batch_size} doesn't divide among {processes} processes; "
                    "change batch_size."
                )

    def ask_to_stop(self, *_: object) -> None:
        """The run ends after the step it is in; several processes agree on which."""
        self._stop_asked = True

    # -- running ---------------------------------------------------------------------------------

    def run(self, stop_after: float | None = None) -> None:
        """Steps until the recipe ends, or until it is asked to stop; then saves."""
        recipe, main = self.recipe, self.accelerator.is_main_process
        watch = Watch(Path(recipe.run_dir), recipe.steps, self.step, recipe.log_every, main)
        if self.step:
            watch.note(f"going on at step {self.step}")
        saved = None
        while self.step < recipe.steps:
            stage = recipe.stages[recipe.stage_at(self.step)[0]]
            values = self._train_step()
            self.step += 1
            watch.step(self.step, stage.base_size, values)
            if self.step % recipe.save_every == 0:
                self.save()
                saved = self.step
            if self._agreed(self._stop_asked or (stop_after is not None and watch.seconds > stop_after)):
                break
        watch.close()
        if saved != self.step:
            self.save()

    def _train_step(self) -> dict[str, float]:
        number, inside = self.recipe.stage_at(self.step)
        stage, device = self.recipe.stages[number], self.accelerator.device
        rows = share(stage.batch_size, self.accelerator.process_index, self.accelerator.num_processes)
        draws = Draws(self.recipe.seed, number, inside, rows)
        torch.manual_seed(int(draws.of_row(rows.start, "modules").integers(2**63)))  # for what draws by itself, such as dropout
        batch = self.source.batch(self.recipe.part_at("source", number).settings, stage, draws).to(device)
        batch = self._with_dropped(batch, draws)
        settings, conditions = self.recipe.part_at("objective", number).settings, self.method.conditions(self.network, batch)
        beside, sound = self.companions.train(settings, conditions, batch, draws, self.recipe.learning_rate(self.step))
        with self.accelerator.autocast():
            losses = self.objective.losses(settings, self.model, conditions, batch, draws)
        means = {name: self._mean(loss, batch) for name, loss in losses.items()}
        self.accelerator.backward(sum(means.values()))
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        self._update(sound and bool(torch.isfinite(norm)))
        shown = self.accelerator.reduce(torch.stack([loss.detach() for loss in means.values()]), reduction="mean")
        return {**beside, **dict(zip(means, shown.tolist(), strict=True)), "grad_norm": float(norm)}

    def _with_dropped(self, batch: Batch, draws: Draws) -> Batch:
        recipe = self.recipe
        if not recipe.caption_dropout:
            return batch
        keep = recipe.dropped_mask == "caption"
        null = self.method.null_rows(self.network) if keep else self.source.null_context
        if null is None:
            raise ConfigError("These weights bring no null caption (y_embedding); choose dropped_mask 'empty'.")
        return drop_captions(batch, null, recipe.caption_dropout, keep, draws)

    def _mean(self, loss: Tensor, batch: Batch) -> Tensor:
        """Over the pictures of all processes, whose gradients are averaged afterwards."""
        return (loss * batch.weight).sum() * self.accelerator.num_processes / batch.total

    def _update(self, finite: bool) -> None:
        """One step of the optimizers and the average; gradients that are not finite are skipped, and many are an error."""
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
            self.average.update()
            self.objective.after_update(self.average)

    def _agreed(self, flag: bool) -> bool:
        """True in every process once any says so; all must leave the loop at the same step."""
        if self.accelerator.num_processes == 1:
            return flag
        votes = torch.tensor([float(flag)], device=self.accelerator.device)
        return self.accelerator.reduce(votes, reduction="sum").item() > 0

    # -- keeping ---------------------------------------------------------------------------------

    def save(self) -> None:
        """Writes the state to go on from, then the averaged weights; each appears whole."""
        info = {"recipe": self.recipe.to_dict(), "base": _file_mark(self.recipe.initialize), "skipped": self._skipped}
        write_state(Path(self.recipe.run_dir), self.step, self._tensors(), info)
        if self.accelerator.is_main_process:
            metadata = {"step": str(self.step), "license": "Apache-2.0", **self.objective.metadata()}
            self.method.write(self.network, self.average.values, Path(self.recipe.output), metadata)

    def resume(self, folder: Path, accept_changes: bool = False) -> None:
        """Goes on from a state; raises ConfigError where the recipe or the file that it starts from has changed since."""
        info = read_info(folder)
        if not accept_changes:
            now = {**self.recipe.to_dict(), "content of initialize": _file_mark(self.recipe.initialize)}
            check_same(folder, {**info["recipe"], "content of initialize": info.get("base")}, now)
        prepare_optimizers(self._bare_optimizers, self._names, stored_shapes(folder))
        self.companions.prepare(stored_shapes(folder))
        read_tensors(folder, self._tensors())
        self.step = info["step"]

    def _tensors(self) -> dict[str, Tensor]:
        """Everything that a run changes, by name."""
        trained = {f"network.{name}": value.detach() for name, value in self._bare_model.named_parameters() if value.requires_grad}
        average = {f"average.{name}": value for name, value in self.average.values.items()}
        own = {f"objective.{name}": value for name, value in self.objective.state().items()}
        optimizers = optimizer_tensors(self._bare_optimizers, self._names)
        return {**trained, **average, **own, **optimizers, **self.companions.tensors()}

    @property
    def _bare_model(self) -> torch.nn.Module:
        return self.accelerator.unwrap_model(self.model)

    @property
    def _bare_optimizers(self) -> list[torch.optim.Optimizer]:
        return [getattr(optimizer, "optimizer", optimizer) for optimizer in self.optimizers]

    @property
    def _names(self) -> dict[int, str]:
        return {id(parameter): name for name, parameter in self._bare_model.named_parameters()}


def _file_mark(path: Any) -> str | None:
    """Tells one file's content from another's: its size, and a hash of both ends."""
    if path is None or not Path(path).is_file():
        return None
    size = Path(path).stat().st_size
    with Path(path).open("rb") as file:
        digest = hashlib.sha256(file.read(HASHED_BYTES))
        file.seek(max(0, size - HASHED_BYTES))
        digest.update(file.read())
    return f"{size}-{digest.hexdigest()[:16]}"
