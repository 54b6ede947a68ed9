"""What the programs on a host share: one running instance, and a log with times."""

import contextlib
import fcntl
import logging
import os
import signal
import sys
import time
from pathlib import Path

HOST_FOLDER = Path("~/.heliostat")
"""The folder for the files of these programs."""


def replace_running_instance(pid_file: Path, timeout_s: float = 10.0) -> int:
    """End the process that has locked `pid_file`, and lock it; returns the file's descriptor.

    The new instance wins because it has the newest code and settings. Raises TimeoutError if the
    old one does not end.
    """
    pid_file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(pid_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            holder = os.pread(descriptor, 20, 0).decode().strip()
            if holder.isdigit() and int(holder) != os.getpid():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(holder), signal.SIGTERM)
            if time.monotonic() > deadline:
                raise TimeoutError(f"process {holder} does not release {pid_file}") from None
            time.sleep(0.1)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    return descriptor


def log_to_stdout() -> None:
    """Write this process's log to standard output, each line with its time in UTC."""
    formatter = logging.Formatter("%(asctime)sZ %(message)s", "%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(formatter)
    logging.basicConfig(level=logging.INFO, handlers=[handler])
