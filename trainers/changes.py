"""Fields of a spec that change while the run goes on."""

from typing import Annotated, Any

from pydantic import Field, field_validator

from cluster.base.config import Spec

CHANGEABLE = ("optimizer", "model", "train.clip_norm")
"""Sections and fields on which neither the data nor the length of a run depends."""


class ChangeSpec(Spec):
    """Other values of some fields from some step on."""

    step: Annotated[int, Field(gt=0)]
    """Steps after which they change."""
    set: dict[str, Any]
    """Dotted path of a field -> its value from then on. Fields of the optimizer, train.clip_norm,
    and fields of the model on which its shape does not depend."""

    @field_validator("set")
    @classmethod
    def _check_paths(cls, values: dict[str, Any]) -> dict[str, Any]:
        for path in values:
            if not can_change(path):
                raise ValueError(
                    f"{path} cannot change while a run goes on; {', '.join(CHANGEABLE)} can"
                )
        return values


def can_change(path: str) -> bool:
    """Whether a field can have another value from some step on, while the run goes on."""
    return any(path == each or path.startswith(f"{each}.") for each in CHANGEABLE)
