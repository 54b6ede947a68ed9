"""`heliostat cluster check`: mistakes in a file for Ray's launcher, found before it costs money.

Each finding is one line that begins with the dotted path of the mistake. Nothing is started. The
only service asked is AWS, if there are credentials for it: whether the region has the instances.
"""

import contextlib
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cluster.base.config import read_yaml
from cluster.base.errors import SpecError
from cluster.connection.ray_internals import prepare_launcher_file, validate_launcher_file
from cluster.definition.check_access import (
    check_credentials,
    check_local_files,
    check_open_ports,
    check_token,
)
from cluster.definition.check_machines import (
    check_disks,
    check_instances,
    check_labels,
    check_zones,
)
from cluster.definition.hourly_cost import hourly_cost_lines
from cluster.definition.launcher_config import (
    LauncherConfig,
    missing_programs,
    mounted_from,
    shell_commands,
    string_values,
    without_shell_comments,
)

PLACEHOLDERS = re.compile(
    r"ami-0{17}|203\.0\.113\.\d+|192\.0\.2\.\d+|198\.51\.100\.\d+|my-project|my-bucket|"
    r"registry\.example\.com"
)
"""Values of the rendered files that belong to nobody, such as addresses reserved for examples."""

_CONSTRAINTS = re.compile(r"pip install[^;&|]*? (?:-c|--constraint)[ =](\S+)")
_PINS = re.compile(r"\b([A-Za-z][\w.-]*)(?:\[[\w,]+\])?==([\w.+]+)")


@dataclass(frozen=True)
class CheckReport:
    findings: list[str]
    prices: list[str]


def check_file(path: Path) -> CheckReport:
    """All findings in a file, and what its cluster costs an hour.

    Raises SpecError if the file cannot be read or is not for Ray's launcher.
    """
    if path.is_file() and re.search(r"(?m)^apiVersion:", path.read_text(errors="replace")):
        raise SpecError(f"{path}: for Kubernetes: ask `kubectl apply --dry-run=server -f {path}`")
    config = read_yaml(path)
    if not isinstance(config.get("provider"), dict) or "type" not in config["provider"]:
        raise SpecError(f"{path}: not a file for Ray's launcher, it has no provider.type")
    mistakes = list(_check_schema(config))
    if mistakes:  # the other checks rely on the schema
        return CheckReport(mistakes, [])
    prepared = _prepared(config)
    checks: list[Callable[[LauncherConfig], Iterator[str]]] = [
        _check_placeholders,
        check_instances,
        check_labels,
        check_zones,
        check_disks,
        _check_versions,
        _check_programs,
        check_open_ports,
        check_token,
        check_local_files,
        check_credentials,
    ]
    findings = [line for check in checks for line in check(prepared)]
    return CheckReport(findings, hourly_cost_lines(prepared))


def _prepared(config: LauncherConfig) -> dict[str, Any]:
    """The file with the launcher's defaults filled in, which is what `ray up` runs."""
    prepared = prepare_launcher_file(config)
    # Ray puts the common commands before those of the head and the workers. Without this, a
    # finding in a common command would be reported three times.
    for section in ("head_setup_commands", "worker_setup_commands"):
        prepared[section] = prepared[section][len(prepared["setup_commands"]) :]
    return prepared


def _check_schema(config: LauncherConfig) -> Iterator[str]:
    """The first violation of Ray's schema and rules."""
    from jsonschema import ValidationError

    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            prepared = _prepared(config)
        head = prepared.get("head_node_type")
        validate_launcher_file(prepared)
    except ValidationError as error:
        path = ".".join(str(part) for part in error.absolute_path) or "the file"
        yield f"{path}: {error.message.splitlines()[0][:200]}"
        return
    except (SystemExit, ValueError, RuntimeError, KeyError, AssertionError, OSError) as error:
        lines = (str(error) or output.getvalue()).strip().splitlines() or ["no reason given"]
        yield f"provider: Ray refuses the file: {lines[-1][:200]}"
        return
    for name, node_type in prepared["available_node_types"].items():
        if name != head and node_type["min_workers"] > node_type["max_workers"]:
            yield (
                f"available_node_types.{name}.min_workers: must be at most max_workers "
                f"(got {node_type['min_workers']} of {node_type['max_workers']})"
            )


def _check_placeholders(config: LauncherConfig) -> Iterator[str]:
    for path, value in string_values(config):
        found = PLACEHOLDERS.search(without_shell_comments(value))
        if found:
            yield f"{path}: still the example's {found[0]}"


def _check_versions(config: LauncherConfig) -> Iterator[str]:
    """Packages that the commands would install in another version than the one installed here."""
    for path, command in shell_commands(config):
        if "dev0" in command or "nightly" in command:
            yield f"{path}: installs a nightly build of Ray, one of the launcher's defaults"
        for name, pinned in re.findall(_PINS, command):
            yield from _version_difference(path, name, pinned)
        for file in re.findall(_CONSTRAINTS, command):
            local = mounted_from(config, file)
            if local is None or not local.is_file():
                yield f"{path}: {file} is not among file_mounts"
                continue
            for line in local.read_text(encoding="utf-8").splitlines():
                name, equals, pinned = line.partition("#")[0].strip().partition("==")
                if equals:
                    yield from _version_difference(f"{path}: {local}", name, pinned)


def _version_difference(path: str, name: str, pinned: str) -> Iterator[str]:
    with contextlib.suppress(PackageNotFoundError):  # not installed here, so nothing to compare
        here = version(name)
        if here.partition("+")[0] != pinned.partition("+")[0]:
            yield f"{path}: {name} {pinned} there, but {here} here"


def _check_programs(config: LauncherConfig) -> Iterator[str]:
    for path, module in missing_programs(config):
        yield (
            f"{path}: there is no module {module} in this version; render the file again with "
            "`heliostat cluster render`"
        )
