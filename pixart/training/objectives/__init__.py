"""What one step computes from a batch: one module an objective, with its `Settings` and `Part`."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from ..average import Average
from ..batch import Batch, Source
from ..draws import Draws
from ..recipe import Recipe


@dataclass(frozen=True)
class Turn:
    """One update of a trained companion before the network's step."""

    companion: str  # its name
    number: int  # of those in this step, from 0: what tells their random numbers apart
    rate: float = 1.0  # times the step's learning rate


class Objective(Protocol):
    """One loss; it may bring modules of its own, which are trained beside the network or by itself."""

    def check_run(self, recipe: Recipe, source: Source) -> None:
        """Raises ConfigError where the run lacks what the losses need, before anything is computed."""

    def wrap(self, network: nn.Module, source: Source) -> nn.Module:
        """The module whose parameters the loop trains: the network, or one that holds it and trained helpers."""

    def losses(self, settings: Any, model: nn.Module, conditions: dict[str, Any], batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Named losses (B,), one for each picture; their sum is what is minimised.

        settings: those of the stage. model: what `wrap` returned, prepared for the run. conditions: of `Method.conditions`.
        """

    def after_update(self, average: Average) -> None:
        """Called when the network has made a step: targets and networks of the objective's own follow here."""

    def state(self) -> dict[str, Tensor]:
        """Tensors of its own that a run needs to go on; they are filled in place on resume."""

    def companions(self) -> Mapping[str, nn.Module]:
        """Networks of the same making beside the trained one, by name; they are there behind `wrap`.

        The loop treats their blocks as the network's. Those that require gradients are trained, by optimizers of their own,
        whose tensors and weights are in the run's state; the others are frozen.
        """

    def turns(self, settings: Any) -> Sequence[Turn]:
        """Updates of trained companions before each step of the network, in order."""

    def companion_losses(
        self, turn: Turn, settings: Any, model: nn.Module, conditions: dict[str, Any], batch: Batch, draws: Draws
    ) -> dict[str, Tensor]:
        """As `losses`, for one turn of a companion; model: the companion, prepared for the run."""

    def metadata(self, settings: Any) -> dict[str, str]:
        """What the result's file says beside its weights, such as how to sample from it; settings: of the stage."""
