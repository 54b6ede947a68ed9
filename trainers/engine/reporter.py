"""What the training loop reports, without ever waiting for it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from trainers.checkpoints.checkpoints import Checkpoints


class Reporter(Protocol):
    """What the training loop says about itself. Nothing but `flush` ever waits."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Take metrics measured after `step` steps."""

    def log_note(self, name: str, text: str) -> None:
        """Take a fact about the run that is no series of numbers, such as what `auto` chose."""

    def on_step_end(self, step: int) -> None:
        """Called after every step."""

    def flush(self) -> None:
        """Return when all that was logged is on a disk."""

    def on_evaluation_end(
        self, metrics: Mapping[str, float], step: int, checkpoints: "Checkpoints"
    ) -> None:
        """Called after the metrics of an evaluation were logged, and the state saved if due."""

    def should_stop(self) -> bool:
        """Whether somebody wants the run to stop; it may take a second to be heard."""

    def preemption_pending(self) -> bool:
        """Whether the machine of some worker is about to be taken away."""


class NullReporter:
    """The reporter of all workers but the first."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        pass

    def log_note(self, name: str, text: str) -> None:
        pass

    def on_step_end(self, step: int) -> None:
        pass

    def flush(self) -> None:
        pass

    def on_evaluation_end(
        self, metrics: Mapping[str, float], step: int, checkpoints: "Checkpoints"
    ) -> None:
        pass

    def should_stop(self) -> bool:
        return False

    def preemption_pending(self) -> bool:
        return False
