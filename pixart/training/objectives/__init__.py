"""What one step computes from a batch: one module an objective, with its `Settings` and `Part`."""
from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from ..average import Average
from ..batch import Batch, Source
from ..draws import Draws


class Objective(Protocol):
    """One loss; it may bring modules of its own, which are trained beside the network or by itself."""

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
