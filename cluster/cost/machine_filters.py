"""Conditions on the catalogue's machines, as in `--on "provider=aws accelerator=T4 usd<5"`.

A condition is a field, one of `= != < <= > >=`, and a value. Words may be several, separated by
commas, and patterns: `region=us-*,ca-*`. All conditions have to hold.
"""

import fnmatch
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from cluster.base.config import did_you_mean
from cluster.base.errors import SpecError
from cluster.cost.catalog import Instance

Field = Callable[[Instance], str | float | None]

FIELDS: dict[str, Field] = {
    "provider": lambda instance: instance.provider,
    "region": lambda instance: instance.region,
    "name": lambda instance: instance.name,
    "accelerator": lambda instance: instance.accelerator or "none",
    "accelerators": lambda instance: float(instance.accelerators),
    "vcpus": lambda instance: instance.vcpus,
    "memory_gib": lambda instance: instance.memory_bytes / 2**30,
    "usd": lambda instance: instance.usd_per_h,
    "spot_usd": lambda instance: instance.spot_usd_per_h,
}
"""What can be asked for; the prices are of an hour."""
WORDS = ("provider", "region", "name", "accelerator")

COMPARE: dict[str, Callable[[float, float], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}

SHOWN = 12
"""How many values a message lists."""


@dataclass(frozen=True)
class Condition:
    """One of the words after `--on`."""

    text: str
    field: str
    compare: str
    value: str

    def holds(self, instance: Instance) -> bool:
        """Whether it does; never for a number that is unknown."""
        found = FIELDS[self.field](instance)
        if isinstance(found, str):
            patterns = self.value.lower().split(",")
            one = any(fnmatch.fnmatchcase(found.lower(), pattern) for pattern in patterns)
            return one == (self.compare == "=")
        return found is not None and COMPARE[self.compare](found, float(self.value))


def select(text: str, instances: Sequence[Instance]) -> list[Instance]:
    """The machines for which every condition of `text` holds.

    Raises SpecError with one line that says what is wrong, or what would match.
    """
    conditions = [_condition(word) for word in text.split()]
    if not conditions:
        raise SpecError(f"--on: needs conditions, such as provider=aws usd<5 ({_list(FIELDS)})")
    left = list(instances)
    for number, condition in enumerate(conditions):
        found = [each for each in left if condition.holds(each)]
        if not found:
            others = " ".join(each.text for each in conditions[:number])
            among = f" with {others}" if others else ""
            raise SpecError(
                f"--on {condition.text}: no machine{among} has that; "
                f"{condition.field}: {_values(condition.field, left)}"
            )
        left = found
    return left


def _condition(word: str) -> Condition:
    match = re.fullmatch(r"(\w+)(<=|>=|!=|=|<|>)(.+)", word)
    if match is None:
        raise SpecError(f"--on {word}: must look like provider=aws or usd<5")
    field, compare, value = match.groups()
    if field not in FIELDS:
        raise SpecError(f"--on {word}: unknown field {field!r}{did_you_mean(field, FIELDS)}")
    if field in WORDS:
        if compare not in ("=", "!="):
            raise SpecError(f"--on {word}: {field} is a word; use = or !=")
    else:
        try:
            float(value)
        except ValueError:
            raise SpecError(f"--on {word}: {field} is a number (got {value!r})") from None
    return Condition(word, field, compare, value)


def _values(field: str, instances: Iterable[Instance]) -> str:
    found = {value for each in instances if (value := FIELDS[field](each)) is not None}
    words = sorted(value for value in found if isinstance(value, str))
    numbers = sorted(value for value in found if isinstance(value, float))
    if numbers:
        return f"{numbers[0]:g} to {numbers[-1]:g}"
    return _list(words) if words else "unknown for all of these"


def _list(words: Iterable[str]) -> str:
    words = list(words)
    more = f" and {len(words) - SHOWN} more" if len(words) > SHOWN else ""
    return ", ".join(words[:SHOWN]) + more
