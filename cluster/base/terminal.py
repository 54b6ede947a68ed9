"""What the person at the terminal sees, apart from what libraries write there.

Ray, its workers and MLflow all print to the process's standard output and error, some of them
from C++. While a run is on, `quiet` sends those two file descriptors to a log file and leaves
the terminal itself to one rich console.
"""

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console


@contextlib.contextmanager
def redirect_output(log: Path, verbose: bool = False) -> Iterator[Console]:
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


PROGRESS_PREFIX = "\x1e"
"""What a line of progress in a job's log begins with; whoever follows the job shows the newest."""

PROGRESS_INTERVAL_S = 3.0


class JobProgress:
    """The progress of a submitted job, as lines in its log every few seconds."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last_s = -math.inf if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ else math.inf

    def report(self, line: Callable[[], str]) -> None:
        """Write the line, if it is time to and somebody may follow."""
        now_s = time.monotonic()
        if now_s < self._last_s + PROGRESS_INTERVAL_S or self._console.is_terminal:
            return
        self._last_s = now_s
        self._console.file.write(f"{PROGRESS_PREFIX}{line()}\n")
        self._console.file.flush()
