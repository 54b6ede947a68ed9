"""The interface by which the training loop reports its progress and hears of requests."""

import posixpath
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainers.checkpoints.checkpoints import Checkpoints

MAX_NAME_LENGTH = 200
"""Characters of a name; MLflow's own limit is 250."""


def mlflow_name(name: str) -> str:
    """The nearest name that MLflow accepts; several names may have the same one."""
    allowed = re.sub(r"[^/\w.\- :]", "_", name)
    return posixpath.normpath(allowed).lstrip("./")[:MAX_NAME_LENGTH] or "_"


class Reporter:
    """Receives the reports of the training loop. No method but `flush` may block.

    Each method does nothing here; a reporter overrides the events that it needs.
    """

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record metrics measured after `step` steps."""

    def log_note(self, name: str, text: str) -> None:
        """Record a fact about the run in words, such as the choice that `auto` made."""

    def on_step_end(self, step: int) -> None:
        """Called after every step."""

    def flush(self) -> None:
        """Return when everything that was logged is on a disk."""

    def on_evaluation_end(
        self, metrics: Mapping[str, float], step: int, checkpoints: "Checkpoints"
    ) -> None:
        """Called after the metrics of an evaluation were logged, and the state saved if due."""

    def should_stop(self) -> bool:
        """Whether a stop of the run was requested; a request may take a second to arrive."""
        return False

    def preemption_pending(self) -> bool:
        """Whether the machine of some worker is about to be taken away."""
        return False


class NullReporter(Reporter):
    """Reports nothing: for ranks other than 0."""
