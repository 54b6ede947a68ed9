"""The shape of the house: which package may import which, what starts quickly, what is pinned."""

import ast
import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

HOME = Path(__file__).parents[1]
MAY_IMPORT = {
    "cluster": {"cluster"},
    "trainers": {"cluster", "trainers"},
    "tuning": {"cluster", "trainers", "tuning"},
}
HEAVY = ("torch", "ray", "mlflow", "pydantic", "rich", "numpy", "pyarrow")
SOURCES = [
    path.relative_to(HOME) for package in MAY_IMPORT for path in (HOME / package).rglob("*.py")
]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of every import, wherever in the file it stands."""
    package = path.parent.parts
    for node in ast.walk(ast.parse((HOME / path).read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            around = package[: len(package) - node.level + 1] if node.level else ()
            yield node.lineno, ".".join((*around, node.module or node.names[0].name))


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_imports_point_left(path: Path) -> None:
    allowed = MAY_IMPORT[path.parts[0]]
    wrong = [
        f"{path}:{line}: imports {name}"
        for line, name in imports(path)
        if name.partition(".")[0] in MAY_IMPORT.keys() - allowed
        or (path.parts[0] == "cluster" and name.partition(".")[0] == "torch")
    ]
    assert not wrong


def loaded_by(code: str) -> set[str]:
    """The top-level modules that are loaded in a new Python after `code`."""
    show = "\nimport json, sys\nprint('\\n' + json.dumps([name for name in sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", code + show], capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_head_node_needs_no_gpu_stack() -> None:
    modules = [
        ".".join(path.with_suffix("").parts) for path in SOURCES if path.parts[0] == "cluster"
    ]
    loaded = loaded_by("\n".join(f"import {module}" for module in modules))
    assert loaded >= {"cluster.base.config", "cluster.connection.ray_connection"}
    assert not loaded & {"torch", "ray", "mlflow"}


HELP = """
from heliostat.main import main
try:
    main(['--help'])
except SystemExit as end:
    assert end.code == 0
"""


def test_help_loads_nothing_heavy() -> None:
    loaded = loaded_by(HELP)
    assert "trainers.cli.train" in loaded
    assert not loaded & set(HEAVY)


def test_help_is_instant() -> None:
    """CPU seconds of the whole process, the best of five."""
    spent_s = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", HELP], stdout=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent_s.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(spent_s) <= 0.25


def pins() -> dict[str, str]:
    """Canonical name -> version of every line of constraints.txt; each must pin with ==."""
    found = {}
    for line in (HOME / "constraints.txt").read_text().splitlines():
        text = line.partition("#")[0].strip()
        if not text:
            continue
        requirement = Requirement(text)
        specifiers = list(requirement.specifier)
        assert [s.operator for s in specifiers] == ["=="], line
        assert "*" not in specifiers[0].version, line
        name = canonicalize_name(requirement.name)
        assert name not in found, f"{name} is pinned twice"
        found[name] = specifiers[0].version
    return found


def needed(name: str, extras: frozenset[str], seen: dict[str, frozenset[str]]) -> None:
    """Put the distribution and all that it requires here into `seen`, with their extras."""
    key = canonicalize_name(name)
    if extras <= seen.get(key, frozenset()) and key in seen:
        return
    seen[key] = seen.get(key, frozenset()) | extras
    for line in distribution(name).requires or ():
        requirement = Requirement(line)
        environments = [{"extra": extra} for extra in ("", *extras)]
        marker = requirement.marker
        if marker is None or any(marker.evaluate(each) for each in environments):
            needed(requirement.name, frozenset(requirement.extras), seen)


def test_everything_that_is_installed_for_us_is_pinned() -> None:
    """At the installed version. NVIDIA's own libraries are left out: torch pins them itself."""
    seen: dict[str, frozenset[str]] = {}
    try:
        needed("heliostat", frozenset({"dev"}), seen)
    except PackageNotFoundError as error:
        pytest.fail(f"the environment is not complete: {error.name}")
    assert {"torch", "ray", "aiohttp-cors", "pytest"} <= seen.keys()
    ours = {
        name: Version(distribution(name).version).public
        for name in seen
        if name not in ("heliostat", "triton") and not name.startswith(("nvidia-", "cuda-"))
    }
    pinned = pins()
    assert {name: pinned.get(name) for name in ours} == ours
