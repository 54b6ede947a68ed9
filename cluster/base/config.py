"""Specs: strict models read from YAML, changed by dotted paths, with errors that name the path.

`read_yaml` gives plain dictionaries, `apply_overrides` changes them by dotted path, `validate`
turns them into frozen models, and `flatten` gives back one scalar per dotted path. The same dotted
path is the key in the file, the override on the command line, the key of a search space, the name
of the MLflow parameter, and the place named in an error.
"""

import difflib
import functools
import io
import logging
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from cluster.base.errors import SpecError
from cluster.base.files import write_atomic

ModelT = TypeVar("ModelT", bound=BaseModel)

logger = logging.getLogger(__name__)


class Spec(BaseModel):
    """Base class of all specs: frozen, and an unknown key is an error."""

    renamed_fields: ClassVar[Mapping[str, str]] = {}
    """Old name -> today's name. `validate` still reads the old names, with a warning."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a mapping from a YAML 1.2 file, so that `3e-4` is a number and `no` is a word.

    Raises SpecError if the file is missing, is not valid YAML, repeats a key, or is not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise SpecError(f"{path}: {reason}") from None
    data = _parse_yaml(text, str(path))
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise SpecError(f"{path}: must be a mapping of sections (got {_shortened(data)})")
    return data


def write_yaml(data: Mapping[str, Any], path: Path, comment: str = "") -> None:
    """Write a mapping as block YAML that `read_yaml` gives back unchanged. Atomic.

    The lines of the `comment` are at the top.
    """
    text = io.StringIO()
    text.writelines(f"# {line}\n" for line in comment.splitlines())
    YAML().dump(dict(data), text)
    write_atomic(path, text.getvalue())


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return YAML(typ="safe", pure=True).load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        problem = (error.problem or str(error)).splitlines()[0]
        raise SpecError(f"{place}: broken YAML: {problem}") from None
    except (YAMLError, ValueError, KeyError) as error:  # the last two: an impossible date or tag
        raise SpecError(f"{source}: broken YAML: {str(error).splitlines()[0]}") from None


def apply_overrides(data: Mapping[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """Apply `a.b=value` assignments, each value read as YAML, to a copy of `data`."""
    result = dict(data)
    for assignment in assignments:
        path, equals, value = assignment.partition("=")
        if not equals or not path.strip():
            raise SpecError(f"--set {assignment}: must look like optimizer.lr=3e-4")
        result = with_value(result, path.strip(), _parse_yaml(value, f"--set {path}"))
    return result


def with_value(data: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of `data` in which the value at the dotted `path` is `value`.

    A key of `data` may have dots itself, as those of `sweep.parameters` do. An element of a list
    has its index as its key.
    """
    head = next(
        (key for key in data if "." in str(key) and f"{path}.".startswith(f"{key}.")),
        path.partition(".")[0],
    )
    rest = path[len(head) + 1 :]
    result = dict(data)
    if not rest:
        result[head] = value
        return result
    inner = result.get(head)
    index = rest.partition(".")[0]
    if isinstance(inner, list | tuple) and index.isdecimal() and int(index) < len(inner):
        elements = {str(place): element for place, element in enumerate(inner)}
        result[head] = list(with_value(elements, rest, value).values())
        return result
    if inner is not None and not isinstance(inner, Mapping):
        raise SpecError(f"{head}: has no key {rest!r}, it is {_shortened(inner)}")
    try:
        result[head] = with_value(inner or {}, rest, value)
    except SpecError as error:
        raise SpecError(f"{head}.{error}") from None
    return result


def flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """One entry per leaf, keyed by dotted path. Lists are leaves."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def validate(model: type[ModelT], data: Any, prefix: str = "") -> ModelT:
    """Turn plain data into a `model`, or raise a SpecError with one line per mistake.

    `prefix` is the dotted path of `data` in its file, such as `model.`; errors begin with it.
    """
    data = _with_current_names(model, data, prefix)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        details = error.errors(include_url=False)
        raise SpecError("\n".join(_error_lines(model, data, details, prefix))) from None


def _with_current_names(model: Any, data: Any, prefix: str) -> Any:
    """`data` with fields under their current names, and a warning for each old name.

    When both names of a field are there, the one that was set last counts: an override comes after
    the file's own value.
    """
    if not isinstance(data, Mapping) or not hasattr(model, "model_fields"):
        return data
    current: dict[Any, Any] = {}
    for key, value in data.items():
        name = getattr(model, "renamed_fields", {}).get(key, key)
        if name != key:
            _warn_of_old_name(f"{prefix}{key}", f"{prefix}{name}")
        inner = (
            _inner_model(model.model_fields[name].annotation)
            if name in model.model_fields
            else None
        )
        current[name] = _with_current_names(inner, value, f"{prefix}{name}.")
    return current


@functools.cache
def _warn_of_old_name(old: str, new: str) -> None:
    """Once for each process, however often a spec is read in it."""
    logger.warning("%s: is called %s now; the old name still works", old, new)


def _error_lines(
    model: type[BaseModel], data: Any, errors: list[ErrorDetails], prefix: str
) -> list[str]:
    """One line per dotted path: pydantic reports each branch of a union as an error of its own."""
    problems: dict[str, list[str]] = {}
    got: dict[str, str] = {}
    for error in errors:
        path = (prefix + _dotted_path(error, data)).rstrip(".")
        problem = _error_text(model, error)
        known = problems.setdefault(path, [])
        if problem not in known:
            known.append(problem)
        if path and error["type"] not in ("extra_forbidden", "missing"):
            got[path] = f" (got {_shortened(error['input'])})"
    return [
        (f"{path}: " if path else "") + " or ".join(found) + got.get(path, "")
        for path, found in problems.items()
    ]


def _dotted_path(error: ErrorDetails, data: Any) -> str:
    """The dotted path of an error, without the union branches that pydantic adds to `loc`."""
    parts: list[str] = []
    for part in error["loc"]:
        inside = isinstance(data, Mapping) and part in data
        if isinstance(data, (list, tuple)) and isinstance(part, int):
            inside = part < len(data)
        if inside:
            data = data[part]
            parts.append(str(part))
        elif error["type"] == "missing" and part == error["loc"][-1]:
            parts.append(str(part))
    return ".".join(parts)


def _error_text(model: type[BaseModel], error: ErrorDetails) -> str:
    if error["type"] == "missing":
        return "is required"
    if error["type"] == "extra_forbidden":
        return "unknown key" + did_you_mean(
            str(error["loc"][-1]), _allowed_keys(model, error["loc"][:-1])
        )
    if error["type"] in ("model_type", "dict_type", "model_attributes_type"):
        return "must be a mapping"
    message = error["msg"].removeprefix("Value error, ")
    message = message.replace("Input should be", "must be")
    return message[0].lower() + message[1:] if message[:1].isupper() else message


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for a near miss, otherwise the list of known words."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f" (known: {', '.join(known)})" if known else ""


def _allowed_keys(model: type[BaseModel], loc: Iterable[int | str]) -> list[str]:
    """Field names of the model at `loc` within `model`."""
    current: Any = model
    for part in loc:
        fields = getattr(current, "model_fields", {})
        if part in fields:
            current = _inner_model(fields[part].annotation)
        elif typing.get_origin(current) is dict:  # any key; all values have one type
            current = _inner_model(typing.get_args(current)[1])
    return list(getattr(current, "model_fields", {}))


def _inner_model(annotation: Any) -> Any:
    """The model in an optional annotation."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        inner = [a for a in typing.get_args(annotation) if hasattr(a, "model_fields")]
        return inner[0] if inner else annotation
    return annotation


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
