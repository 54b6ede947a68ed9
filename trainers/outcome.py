"""How a training run ended."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """What became of a run."""

    step: int
    """Optimizer steps done."""
    total_steps: int
    metrics: Mapping[str, float]
    """The newest value of each metric of evaluation: `val/...`, at the end `test/...`."""
    samples_per_s: float
    """Training samples per second over all workers, since this start, evaluation left out."""

    @property
    def complete(self) -> bool:
        return self.step == self.total_steps
