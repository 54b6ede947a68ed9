"""Filters for the catalogue's machines, as in `--on "provider=aws accelerator=T4 usd<5"`.

A condition is a field, one of `= != < <= > >=`, and a value. The value of a text field can be a
list of patterns, separated by commas: `region=us-*,ca-*`. A machine must match all conditions.
"""

import fnmatch
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from cluster.base.config import did_you_mean
from cluster.base.errors import SpecError
from cluster.cost.catalog import Instance

FieldGetter = Callable[[Instance], str | float | None]

FILTER_FIELDS: dict[str, FieldGetter] = {
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
"""The fields of a condition. Prices are per hour."""
TEXT_FIELDS = ("provider", "region", "name", "accelerator")

COMPARATORS: dict[str, Callable[[float, float], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}

MAX_LISTED = 12
"""Values that a message lists at most."""


@dataclass(frozen=True)
class Condition:
    """One condition after `--on`."""

    text: str
    field: str
    comparator: str
    value: str

    def matches(self, instance: Instance) -> bool:
        """Whether the instance fulfils it. An unknown number fulfils none."""
        found = FILTER_FIELDS[self.field](instance)
        if isinstance(found, str):
            patterns = self.value.lower().split(",")
            one = any(fnmatch.fnmatchcase(found.lower(), pattern) for pattern in patterns)
            return one == (self.comparator == "=")
        return found is not None and COMPARATORS[self.comparator](found, float(self.value))


def select_machines(text: str, instances: Sequence[Instance]) -> list[Instance]:
    """The machines that match every condition in `text`.

    Raises SpecError with one line for a wrong condition, or one that no machine matches.
    """
    conditions = [_parse_condition(word) for word in text.split()]
    if not conditions:
        raise SpecError(
            f"--on: needs conditions, such as provider=aws usd<5 ({_shortened_list(FILTER_FIELDS)})"
        )
    left = list(instances)
    for number, condition in enumerate(conditions):
        found = [each for each in left if condition.matches(each)]
        if not found:
            others = " ".join(each.text for each in conditions[:number])
            among = f" with {others}" if others else ""
            raise SpecError(
                f"--on {condition.text}: no machine{among} matches; "
                f"{condition.field}: {_value_range(condition.field, left)}"
            )
        left = found
    return left


def _parse_condition(word: str) -> Condition:
    match = re.fullmatch(r"(\w+)(<=|>=|!=|=|<|>)(.+)", word)
    if match is None:
        raise SpecError(f"--on {word}: must look like provider=aws or usd<5")
    field, compare, value = match.groups()
    if field not in FILTER_FIELDS:
        raise SpecError(f"--on {word}: unknown field {field!r}{did_you_mean(field, FILTER_FIELDS)}")
    if field in TEXT_FIELDS:
        if compare not in ("=", "!="):
            raise SpecError(f"--on {word}: {field} is text; use = or !=")
    else:
        try:
            float(value)
        except ValueError:
            raise SpecError(f"--on {word}: {field} is a number (got {value!r})") from None
    return Condition(word, field, compare, value)


def _value_range(field: str, instances: Iterable[Instance]) -> str:
    found = {value for each in instances if (value := FILTER_FIELDS[field](each)) is not None}
    words = sorted(value for value in found if isinstance(value, str))
    numbers = sorted(value for value in found if isinstance(value, float))
    if numbers:
        return f"{numbers[0]:g} to {numbers[-1]:g}"
    return _shortened_list(words) if words else "unknown for all of these"


def _shortened_list(words: Iterable[str]) -> str:
    words = list(words)
    more = f" and {len(words) - MAX_LISTED} more" if len(words) > MAX_LISTED else ""
    return ", ".join(words[:MAX_LISTED]) + more
