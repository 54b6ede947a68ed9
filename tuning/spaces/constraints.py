"""Bounds on metrics and costs that the trials of a sweep must keep."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_PATTERN = re.compile(r"^\s*(?P<metric>[^\s<>=]+)\s*(?P<sign><=|>=|<|>)\s*(?P<limit>\S+)\s*$")


@dataclass(frozen=True)
class Constraint:
    """One bound, as `val/latency_ms < 10`."""

    metric: str
    is_upper: bool
    """Whether values above the limit break it."""
    is_strict: bool
    """Whether the limit itself breaks it."""
    limit: float

    def violation(self, value: float | None) -> float:
        """How far a value is beyond the limit: positive if and only if it breaks the constraint.

        Infinite for a value that is unknown or NaN.
        """
        if value is None or math.isnan(value):
            return math.inf
        beyond = value - self.limit if self.is_upper else self.limit - value
        return math.ulp(0.0) if beyond == 0 and self.is_strict else beyond


def parse_constraint(text: str) -> Constraint:
    """Raises ValueError if the text is not a name, one of <, <=, >, >= and a number."""
    found = _PATTERN.match(text)
    try:
        limit = float(found["limit"]) if found else math.nan
    except ValueError:
        limit = math.nan
    if found is None or not math.isfinite(limit):
        raise ValueError(f"{text!r} must look like `cost_usd < 2` or `val/accuracy >= 0.9`")
    return Constraint(found["metric"], "<" in found["sign"], "=" not in found["sign"], limit)


def violations(constraints: Sequence[str], known: Mapping[str, Any]) -> dict[str, float]:
    """Each constraint of a sweep -> how far a trial with these metrics and costs breaks it."""
    return {text: _violation(text, known) for text in constraints}


def total_violation(constraints: Sequence[str], known: Mapping[str, Any]) -> float:
    """The sum over the broken constraints; 0 where a trial keeps them all."""
    return sum(max(0.0, _violation(text, known)) for text in constraints)


def _violation(text: str, known: Mapping[str, Any]) -> float:
    constraint = parse_constraint(text)
    return constraint.violation(known.get(constraint.metric))
