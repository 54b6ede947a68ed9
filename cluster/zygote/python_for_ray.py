"""A Ray whose Python processes are forked: the script that it takes for its Python."""

import contextlib
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path


def python_for(folder: Path, owner: str) -> Path:
    """A script that stands for Python in the commands of one Ray; `owner` names that Ray.

    Ray 2.60 builds the commands of its workers and services from `sys.executable`. Its option
    `py_executable` reaches only the workers, each of which then imports Ray twice.
    """
    script = folder / f"python-{owner}"
    if not script.exists():
        stub = Path(__file__).with_name("stub.py")
        words = [sys.executable, "-I", "-S", str(stub), str(folder), owner]
        temporary = script.with_name(f".{script.name}.{os.getpid()}")
        temporary.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
        temporary.chmod(0o700)
        temporary.rename(script)
    return script


@contextlib.contextmanager
def forked_processes(folder: Path, owner: str) -> Iterator[None]:
    """A Ray that is started within this context has its Python processes forked."""
    from cluster.connection.ray_internals import FORKED_RAY_SETTINGS

    python, sys.executable = sys.executable, str(python_for(folder, owner))
    before = {name: os.environ.get(name) for name in FORKED_RAY_SETTINGS}
    os.environ.update(FORKED_RAY_SETTINGS)
    try:
        yield
    finally:
        sys.executable = python
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
