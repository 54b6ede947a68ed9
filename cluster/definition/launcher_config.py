"""How to read a file for Ray's launcher once it is plain data: its commands, texts and mounts."""

import importlib.util
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

LauncherConfig: TypeAlias = Mapping[str, Any]
"""The content of a file for `ray up`."""

_COMMAND_SECTIONS = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)
_PROGRAM = re.compile(r"python -m (cluster\.[\w.]+)")


def shell_commands(config: LauncherConfig) -> Iterator[tuple[str, str]]:
    """Every shell command with its dotted path, without the shell's comments."""
    for section in _COMMAND_SECTIONS:
        for number, command in enumerate(config.get(section, [])):
            yield f"{section}.{number}", without_shell_comments(command)


def without_shell_comments(command: str) -> str:
    return re.sub(r"(?m)^\s*#.*$", "", command)


def string_values(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every string in `value` with its dotted path."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from string_values(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from string_values(inner, f"{path}.{number}")
    elif isinstance(value, str):
        yield path, value


def missing_programs(config: LauncherConfig) -> Iterator[tuple[str, str]]:
    """Programs of ours that the commands start and this version lacks: dotted path, module.

    A file that another version rendered has them.
    """
    for path, command in shell_commands(config):
        for module in _PROGRAM.findall(command):
            if not _module_exists(module):
                yield path, module


def _module_exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # one of the packages above it does not exist
        return False


def mounted_from(config: LauncherConfig, remote: str) -> Path | None:
    """The local file that `file_mounts` copies to `remote` on the hosts; None if it copies none."""
    for target, source in config.get("file_mounts", {}).items():
        if remote == target or remote.startswith(f"{target}/"):
            return Path(source).expanduser() / remote[len(target) :].lstrip("/")
    return None
