"""The values that one parameter of a sweep can take."""

import json
import math
import random
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AliasChoices, Field, field_validator, model_validator

from cluster.base.config import Spec, flatten

if TYPE_CHECKING:
    import optuna

KINDS = ("uniform", "loguniform", "integer", "log_integer", "choice", "same_as")
MOST_STEPS = 100_000
"""Steps of a float up to which its values are listed."""


class Distribution(Spec):
    """The values of one parameter: exactly one of uniform, loguniform, integer, log_integer, choice
    and same_as; with `step`, `log` and `when` where they fit."""

    uniform: tuple[float, float] | None = None
    """[low, high], both included."""
    loguniform: tuple[float, float] | None = None
    """[low, high] with low > 0, uniform in the logarithm."""
    integer: Annotated[
        tuple[int, int] | None, Field(validation_alias=AliasChoices("integer", "int"))
    ] = None
    """[low, high], both included. `int` is the same."""
    log_integer: tuple[int, int] | None = None
    """[low, high] with low >= 1, uniform in the logarithm."""
    choice: Annotated[list[Any], Field(min_length=1)] | None = None
    """A list of values of any type that the field accepts, also of whole sections."""
    same_as: str | None = None
    """Another parameter's path, whose value this one always has."""
    step: Annotated[float, Field(gt=0)] | None = None
    """Only low, low + step, low + 2 step and so on, for uniform and integer."""
    log: bool = False
    """Makes uniform loguniform, and integer log_integer."""
    when: dict[str, Any] = {}
    """Path of another parameter -> the value, or the list of values, for which this one is varied.
    Otherwise its field is as in the file. Several conditions must all hold."""

    @field_validator("when", mode="after")
    @classmethod
    def _by_dotted_path(cls, when: dict[str, Any]) -> dict[str, Any]:
        return flatten(when)

    @model_validator(mode="after")
    def _check_kind_and_order(self) -> "Distribution":
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"must have exactly one of {', '.join(KINDS)}")
        kind, bounds = self.kind, self.bounds
        if bounds is None:
            if self.step is not None or self.log:
                raise ValueError(f"{kind} has no {'log' if self.log else 'step'}")
            return self
        if bounds[0] > bounds[1]:
            raise ValueError(f"{kind} must be [low, high] with low <= high")
        if self.is_log and bounds[0] <= 0:
            raise ValueError(f"{kind} needs low > 0")
        if self.step is not None:
            if self.is_log:
                raise ValueError(f"{kind} has no step; list the values in a choice")
            if self.is_integer and self.step != int(self.step):
                raise ValueError(f"{kind} needs a whole number as its step")
        return self

    @property
    def kind(self) -> str:
        """One of KINDS; with `log`, that of the logarithm."""
        given = next(kind for kind in KINDS if getattr(self, kind) is not None)
        if not self.log:
            return given
        return {"uniform": "loguniform", "integer": "log_integer"}.get(given, given)

    @property
    def is_log(self) -> bool:
        return self.kind in ("loguniform", "log_integer")

    @property
    def is_integer(self) -> bool:
        return self.kind in ("integer", "log_integer")

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The lowest and the highest value; None for a choice and for same_as."""
        bounds = self.uniform or self.loguniform or self.integer or self.log_integer
        if bounds is None or self.step is None or bounds[0] > bounds[1]:
            return bounds
        steps = math.floor(float((_exact(bounds[1]) - _exact(bounds[0])) / _exact(self.step)))
        return bounds[0], self._on_grid(bounds[0], steps)

    def values(self) -> Sequence[Any] | None:
        """All values in their order; None for same_as and for a range that is as good as
        continuous."""
        if self.choice is not None:
            return self.choice
        if self.bounds is None:
            return None
        low, high = self.bounds
        if self.is_integer:
            return range(int(low), int(high) + 1, int(self.step or 1))
        if low == high:
            return [low]
        if self.step is None or (high - low) / self.step > MOST_STEPS:
            return None
        return [self._on_grid(low, count) for count in range(round((high - low) / self.step) + 1)]

    def boundary_values(self) -> list[Any]:
        """The lowest and the highest value; for a choice, all values."""
        return list(self.bounds or self.choice or ())

    def sample(self, rng: random.Random) -> Any:
        """A value at random, as a search at random chooses it. Not for same_as."""
        if self.choice is not None:
            return rng.choice(self.choice)
        assert self.bounds is not None
        low, high = self.bounds
        if self.kind == "loguniform":
            return min(max(math.exp(rng.uniform(math.log(low), math.log(high))), low), high)
        if self.kind == "log_integer":
            exact = math.exp(rng.uniform(math.log(low - 0.5), math.log(high + 0.5)))
            return int(min(max(round(exact), low), high))
        if self.is_integer:
            return rng.randrange(int(low), int(high) + 1, int(self.step or 1))
        return self._snapped(rng.uniform(low - (self.step or 0) / 2, high + (self.step or 0) / 2))

    def to_optuna(self) -> "optuna.distributions.BaseDistribution":
        """Optuna's distribution; a choice is one of the indices of its values. Not for same_as.

        Optuna compares choices with ==, so that 1, true and 1.0 would be one and the same.
        """
        from optuna.distributions import (
            CategoricalDistribution,
            FloatDistribution,
            IntDistribution,
        )

        if self.choice is not None:
            return CategoricalDistribution(tuple(range(len(self.choice))))
        assert self.bounds is not None
        low, high = self.bounds
        if self.is_integer:
            return IntDistribution(int(low), int(high), log=self.is_log, step=int(self.step or 1))
        return FloatDistribution(low, high, log=self.is_log, step=self.step)

    def from_optuna(self, value: Any) -> Any:
        """The parameter's value for the value in Optuna's trial."""
        return self.choice[int(value)] if self.choice is not None else self._snapped(value)

    def optuna_value(self, value: Any) -> Any:
        """The value in Optuna's trial for the parameter's; ValueError if it is no value of it."""
        if self.choice is None:
            assert self.bounds is not None
            low, high = self.bounds
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or (self.is_integer and value != int(value)):
                raise ValueError(f"{value!r} is no {'integer' if self.is_integer else 'number'}")
            if not low <= value <= high:
                raise ValueError(f"{value!r} is not within [{low:g}, {high:g}]")
            if self.step is not None:
                count = round((value - low) / self.step)
                if not math.isclose(self._on_grid(low, count), value):
                    raise ValueError(f"{value!r} is not {low:g} plus a multiple of {self.step:g}")
            return int(value) if self.is_integer else value
        for index, each in enumerate(self.choice):
            if identical(each, value):
                return index
        raise ValueError(f"{value!r} is not in the choice")

    def _snapped(self, value: float) -> float:
        """The value itself or, with a step, the nearest one in decimal notation: 0.3, and not
        0.1 + 2 * 0.1."""
        if self.step is None or self.is_integer:
            return value
        assert self.bounds is not None
        low, high = self.bounds
        return min(self._on_grid(low, max(0, round((value - low) / self.step))), high)

    def _on_grid(self, low: float, count: int) -> float:
        """low + count * step, exact in decimal notation."""
        assert self.step is not None
        value = _exact(low) + count * _exact(self.step)
        return int(value) if self.is_integer else float(value)


def identical(one: Any, other: Any) -> bool:
    """Whether two values of a choice are the same, of the same type: 1, true and 1.0 are three."""
    return _as_json(one) == _as_json(other)


def equal(one: Any, other: Any) -> bool:
    """Whether a value fulfils a condition: 1 equals 1.0, but neither equals true."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    return bool(one == other) or identical(one, other)


def _as_json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _exact(number: float) -> Decimal:
    return Decimal(repr(number))


Parameters = Mapping[str, Distribution]
"""Path of each parameter of a sweep -> its values, in the order of the file."""
