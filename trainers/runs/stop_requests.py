"""Requests of another process to end a run, a sweep or one of its trials: files in the folder."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

STOP_FOLDER = "stop"
"""In the folder of a run or sweep. A file in it is a request, named by what is to end."""
WHOLE = "all"
"""The request to end all of a run or sweep. Those to end a trial are named by its number."""
POLL_S = 0.5
"""Seconds between two looks at the requests."""


def request_stop(folder: Path, what: str = WHOLE) -> None:
    """Ask the process that works on the run or sweep in `folder` to end it, or a trial of it."""
    (folder / STOP_FOLDER).mkdir(exist_ok=True)
    (folder / STOP_FOLDER / what).touch()


def stop_requests(folder: Path) -> set[str]:
    """What is to end: WHOLE, and numbers of trials."""
    try:
        return set(os.listdir(folder / STOP_FOLDER))
    except FileNotFoundError:
        return set()


def withdraw_stop(folder: Path) -> None:
    """Take back the request to end all."""
    (folder / STOP_FOLDER / WHOLE).unlink(missing_ok=True)


@contextlib.contextmanager
def interrupted_on_request(folder: Path) -> Iterator[None]:
    """Interrupt this process, as Ctrl-C does, when it is asked to end the run in `folder`.

    A request from before is of a process that is no more, and is withdrawn.
    """
    withdraw_stop(folder)
    done, main = threading.Event(), threading.main_thread().ident
    assert main is not None

    def watch() -> None:
        while not done.wait(POLL_S):
            if WHOLE in stop_requests(folder):
                withdraw_stop(folder)
                signal.pthread_kill(main, signal.SIGINT)

    thread = threading.Thread(target=watch, daemon=True, name="stop-requests")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
