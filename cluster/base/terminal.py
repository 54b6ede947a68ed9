"""Keeps the terminal for our own output, and sends that of libraries to a log file.

Ray, its workers and MLflow print to the process's standard output and error, some of them from C++.
During a run, `redirect_output` sends these two file descriptors to a log file, and a rich console
writes to the terminal.
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

    Yields a console that writes to the terminal. With `verbose` nothing is redirected.
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
            width = None if file.isatty() else 200  # a pipe has no width
            yield Console(file=file, highlight=False, soft_wrap=True, width=width)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(terminal, 1)
        os.dup2(error, 2)
        os.close(terminal)
        os.close(error)


PROGRESS_PREFIX = "\x1e"
"""First character of a progress line in a job's log; followers of the log show the newest one."""

PROGRESS_INTERVAL_S = 3.0


class JobProgress:
    """Writes the progress of a submitted job to its log, every few seconds."""

    def __init__(self, console: Console) -> None:
        self._console = console
        # Set by Ray for a job's driver, as `cluster.connection.ray_internals` says.
        in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
        self._last_s = -math.inf if in_job else math.inf

    def report(self, line: Callable[[], str]) -> None:
        """Write the line, if the interval is over and the log can be followed."""
        now_s = time.monotonic()
        if now_s < self._last_s + PROGRESS_INTERVAL_S or self._console.is_terminal:
            return
        self._last_s = now_s
        self._console.file.write(f"{PROGRESS_PREFIX}{line()}\n")
        self._console.file.flush()
