"""The process that holds the session's warm Ray: it starts it, and says whether it is clean."""

import contextlib
import gc
import json
import logging
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn

from cluster.base.files import write_atomic
from cluster.connection.ray_internals import (
    leftovers_of_jobs,
    other_drivers,
    reload_configuration,
)
from cluster.zygote.preload import name_process
from cluster.zygote.python_for_ray import forked_processes

CLEAN_TIMEOUT_S = 10.0
"""Within this time Ray has ended what a driver left behind when it ended."""


def hold_ray(folder: Path, control: socket.socket) -> NoReturn:
    """Start a Ray whose Python processes are forked, and keep it until SIGTERM or a left-over.

    Tells its address to `control`, which asks after each command whether it is clean. When the
    other end of `control` has gone, it ends after the commands that use it.
    """
    code = 1
    gc.enable()
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        _hold(folder, control)
        code = 0
    except SystemExit:
        code = 0
    except BaseException as error:
        traceback.print_exc()
        with contextlib.suppress(OSError):
            line = (str(error).strip() or type(error).__name__).splitlines()[0]
            control.sendall(json.dumps({"error": line}).encode() + b"\n")
    finally:
        with contextlib.suppress(BaseException):
            import ray

            ray.shutdown()
        os._exit(code)


def _hold(folder: Path, control: socket.socket) -> None:
    import ray

    owner = f"ray-{os.getpid()}"
    name_process("session-ray")
    (folder / owner).mkdir()
    reload_configuration()
    base = folder / owner / "base.json"
    write_atomic(base, json.dumps(dict(os.environ)))
    with forked_processes(folder, owner):
        ray.init(
            address="local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=str(folder / "ray"),
        )
    address = ray.get_runtime_context().gcs_address
    control.sendall(json.dumps({"address": address}).encode() + b"\n")
    while control.recv(64):
        if not _becomes_clean():
            raise RuntimeError("a command left something in the session's Ray")
        for file in base.parent.glob("*.json"):
            if file != base:
                file.unlink()
        control.sendall(json.dumps({"clean": True}).encode() + b"\n")
    while other_drivers():  # the session was killed, and they go on
        time.sleep(0.5)


def _becomes_clean() -> bool:
    """End what outlives drivers; whether no actor, group or reserved resource is left then.

    Ray Train 2.60 leaves a detached actor, the coordinator of autoscaling.
    """
    import ray

    for actor in ray.util.list_named_actors(all_namespaces=True):
        with contextlib.suppress(ValueError):  # it has ended by itself
            ray.kill(ray.get_actor(actor["name"], namespace=actor["namespace"]))
    deadline_s = time.monotonic() + CLEAN_TIMEOUT_S
    while left := leftovers_of_jobs():
        if time.monotonic() > deadline_s:
            logging.getLogger(__name__).warning("left: %s", ", ".join(left))
            return False
        time.sleep(0.02)
    return True
