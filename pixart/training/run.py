"""A run of a recipe, and what it would do: `python -m pixart train`."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from .contents import check_contents, keep_contents
from .dry_run import describe_run
from .loop import Loop
from .processes import check_batches, make_accelerator, stopped_by_signals
from .recipe import check_given, load_recipe
from .run_places import check_places, check_start, locked
from .state import clear_run, read_info


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
    check_start(recipe)
    state = check_places(recipe, overwrite, accept_changes)  # before features are computed
    run_dir = Path(recipe.run_dir)
    with locked(run_dir):
        loop = Loop(recipe, None if accept_changes else state)
        if state is not None:
            loop.resume(state, accept_changes)
        if loop.accelerator.is_main_process:
            if state is None:
                clear_run(run_dir)
            keep_contents(run_dir, loop.contents)
        loop.accelerator.wait_for_everyone()
        with stopped_by_signals(loop.ask_to_stop):
            loop.run(stop_after)
        loop.say_where_it_stopped()
    return Path(recipe.output)


def dry_run(
    path: str | Path, changes: Sequence[str] = (), *, overwrite: bool = False, accept_changes: bool = False
) -> Iterator[str]:
    """What `train` would do, as lines; the transformer and T5 are not loaded, and nothing is written.

    Raises PixArtError for what would stop the run; where that is pictures, after all lines.
    """
    recipe = load_recipe(path, changes)
    check_given(recipe)
    state = check_places(recipe, overwrite, accept_changes)
    begun = None if state is None else read_info(state)  # now: a run that is going on replaces its states
    accelerator = make_accelerator(recipe)
    check_batches(recipe, accelerator.num_processes)
    source = recipe.source.make(recipe)
    yield from describe_run(recipe, source, accelerator)
    if begun is not None:
        yield f"goes on from step {begun['step']} of {recipe.steps}"
        if source.settled and not accept_changes:
            check_contents(Path(recipe.run_dir), begun.get("contents"), source.contents())
    source.check()
