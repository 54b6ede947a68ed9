"""How a training run ended."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """The result of a training run."""

    step: int
    """Optimizer steps done so far."""
    total_steps: int
    metrics: Mapping[str, float]
    """The latest value of each evaluation metric: `val/...` and, at the end, `test/...`."""
    samples_per_s: float
    """Training samples per second of all workers since this start, without evaluations."""

    @property
    def complete(self) -> bool:
        return self.step == self.total_steps
