"""What the person at the terminal sees, apart from what libraries write there.

Ray, its workers and MLflow all print to the process's standard output and error, some of them
from C++. While a run is on, `quiet` sends those two file descriptors to a log file and leaves
the terminal itself to one rich console.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console


@contextlib.contextmanager
def quiet(log: Path, verbose: bool = False) -> Iterator[Console]:
    """Append everything that this process and its Ray workers print to `log`.

    Yields the console that still writes to the terminal. With `verbose` nothing is redirected.
    """
    if verbose:
        yield Console(highlight=False, soft_wrap=True)
        return
    sys.stdout.flush()
    sys.stderr.flush()
    terminal, error = os.dup(1), os.dup(2)
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)
    try:
        with os.fdopen(terminal, "w", closefd=False) as file:
            width = None if file.isatty() else 200  # a pipe has no width to fit into
            yield Console(file=file, highlight=False, soft_wrap=True, width=width)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(terminal, 1)
        os.dup2(error, 2)
        os.close(terminal)
        os.close(error)
