"""Errors of workers: whether the workers are started again, and the line that a user reads.

An exception of the user's code would be the same at the next attempt, so it ends the run at once.
Failures of storage and devices pass, or come back: they get the restarts of `scale.max_restarts`.
"""

import errno
import logging
import os
import re
import socket
import ssl
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType

from cluster.base.errors import HeliostatError, SpecError, TrainingError
from trainers.engine.stall_files import STALLS
from trainers.run_folder import LOG, display_path
from trainers.runs.ray_train_internals import RetryDecision
from trainers.runs.stalls import last_stall
from trainers.workload import Workload

OUTAGE_ERRNOS = {
    *(errno.EIO, errno.ESTALE, errno.EREMOTEIO, errno.ENXIO, errno.ENODEV, errno.EBUSY),
    *(errno.ENOSPC, errno.EDQUOT, errno.EAGAIN, errno.ETIMEDOUT, errno.ENOBUFS),
    *(errno.ECONNRESET, errno.ECONNABORTED, errno.ECONNREFUSED, errno.EPIPE, errno.ESHUTDOWN),
    *(errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENOTCONN),
    *(errno.ENETUNREACH, errno.ENETDOWN, errno.ENETRESET, socket.EAI_AGAIN),
}
"""Numbers of errors of disks, file servers and networks, rather than of the code that uses them."""
OUTAGE_TEXTS = tuple(os.strerror(number) for number in OUTAGE_ERRNOS if number > 0)
"""The system's words for them, as libraries repeat them in exceptions without a number."""
NUMBER_IN_TEXT = re.compile(r"(?:os error |errno = |\[Errno )(\d+)")
"""How Rust (safetensors), HDF5 and Python write the number."""
STORE_CLIENTS = (
    *("pyarrow", "fsspec", "s3fs", "gcsfs", "adlfs", "botocore", "google", "azure"),
    *("urllib3", "requests", "httpx", "httpcore", "aiohttp", "huggingface_hub"),
)
"""Packages that reach stores over a network, whose exceptions need not be OSErrors."""
STORE_OUTAGE = re.compile(
    r"slow.?down|throttl|reduce your request rate|too many requests|service.?unavailable"
    r"|internal.?(?:server.?)?(?:error|failure)|network.?error|curlcode"
    r"|http status (?:408|429|5\d\d)"
    r"|time.?out|timed out|deadline.?exceeded|unavailable:|temporary failure|connect(?:ion|error)"
    r"|protocolerror|disk i/o error|disk is full",
    re.IGNORECASE,
)
"""What the names and texts of such exceptions, and of OSErrors without a number, say of an outage;
read in Arrow 25 (`s3_internal.h`), fsspec and botocore."""
OUTAGE_STATUSES = {408, 429, 500, 502, 503, 504}
"""HTTP: try again later."""
DEVICE_ERROR = re.compile(
    r"\b(?:CUDA|HIP|XPU|NCCL|cuDNN|MIOpen|NVML)\b.{0,20}\berror\b|\bECC\b|no CUDA GPUs",
    re.IGNORECASE,
)
CODE_ON_DEVICE = re.compile(
    r"device-side assert|invalid (?:argument|configuration|device function|resource|value)"
    r"|no kernel image|out of memory|not[ _]supported|bad_param|invalid_value|too many resources",
    re.IGNORECASE,
)
"""Errors that a device reports of the code that runs on it."""
OUR_PACKAGES = ("cluster", "trainers", "tuning", "heliostat")
STANDARD_LIBRARY = sysconfig.get_path("stdlib")

logger = logging.getLogger(__name__)


class PeerLostError(Exception):
    """A collective failed because a peer died; restart the worker group."""


class PeerPreemptedError(Exception):
    """A collective failed because a peer's machine was preempted; restart the worker group."""


class OutageError(Exception):
    """Storage or a device failed; restart the worker group. The message is for the user."""


def decide_retry(failures: Mapping[int, Exception]) -> RetryDecision:
    """Whether to restart the workers, from the exception of each failed worker.

    Ray Train by itself restarts them after an exception in the user's code as it does after a
    lost machine, so that the user would see a mistake after the last attempt only.
    """
    if any(isinstance(failure, HeliostatError) for failure in failures.values()):
        return "raise"
    if any(isinstance(failure, PeerPreemptedError) for failure in failures.values()):
        return "retry"  # not counted: Ray does not count the preemption that caused it either
    return "count"


def is_peer_loss(error: Exception) -> bool:
    """Whether a collective failed because another worker died."""
    import torch

    if isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and "gloo" in str(error)


def is_outage(error: BaseException) -> bool:
    """Whether storage or a device failed, rather than the code.

    A TrainingError is a verdict already, also on outages that had their restarts.
    """
    return not isinstance(error, TrainingError) and any(
        _is_outage(cause) for cause in _causes(error)
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and those from which it was raised; not those that the user's code had handled."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        failures = getattr(cause, "failures", None)  # of PyTorch's CheckpointException, by rank
        if isinstance(failures, Mapping):
            yield from (failure for failure, _ in failures.values())
        reason = getattr(cause, "reason", None)  # urllib's URLError
        cause = cause.__cause__ or (reason if isinstance(reason, OSError) else None)


def _is_outage(error: BaseException) -> bool:
    text = str(error)
    if isinstance(error, ssl.SSLCertVerificationError):
        return False
    if isinstance(error, (ConnectionError, TimeoutError, ssl.SSLError)):
        return True
    if any(int(number) in OUTAGE_ERRNOS for number in NUMBER_IN_TEXT.findall(text)):
        return True
    if any(words in text for words in OUTAGE_TEXTS) or _http_status(error) in OUTAGE_STATUSES:
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in OUTAGE_ERRNOS
    if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in STORE_CLIENTS:
        return bool(STORE_OUTAGE.search(f"{type(error).__name__} {text}"))
    on_device = isinstance(error, RuntimeError) and DEVICE_ERROR.search(text)
    return bool(on_device) and not CODE_ON_DEVICE.search(text)


def _http_status(error: BaseException) -> int | None:
    """The HTTP status that an exception of a client of a store carries, in the usual places."""
    response = getattr(error, "response", None)
    if isinstance(response, Mapping):  # botocore
        response = response.get("ResponseMetadata")
    if isinstance(response, Mapping):
        return response.get("HTTPStatusCode")
    names = ("status_code", "status", "code")
    found = (getattr(place, name, None) for place in (error, response) for name in names)
    return next((int(status) for status in found if isinstance(status, int)), None)


def worker_failure(error: Exception, preempted: Callable[[], bool]) -> Exception:
    """What a worker raises for an error: the type tells the driver whether to restart.

    `preempted` says whether the machine of a worker is going.
    """
    if is_peer_loss(error):
        traceback.clear_frames(error.__traceback__)  # its model: this process may train again
        return PeerPreemptedError(str(error)) if preempted() else PeerLostError(str(error))
    if is_outage(error):
        logger.warning("storage or a device failed", exc_info=error)
        failure = OutageError(format_error(error))
        traceback.clear_frames(error.__traceback__)
        return failure
    if isinstance(error, SpecError):  # a mistake that only the worker's own device shows
        return error
    return training_error(error)


def format_error(error: BaseException) -> str:
    """One line: the error, and the last line of the user's code that led to it."""
    lines = str(error).strip().splitlines()
    message = lines[0] if lines else ""
    if isinstance(error, (HeliostatError, OutageError)):
        return message
    place = _users_line(error)
    return f"{type(error).__name__}: {message}{f' ({place})' if place else ''}"


def _users_line(error: BaseException) -> str:
    """FILE:LINE of the last call in the user's code; of the last call at all if there is none."""
    calls = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    packages = {kind.__module__.partition(".")[0] for kind in _workloads()} - {*OUR_PACKAGES}
    ranks = [_ownership(frame, packages) for frame, _ in calls]
    if not ranks:
        return ""
    last = max(range(len(calls)), key=lambda number: (ranks[number], number))
    frame, line = calls[last]
    return f"{display_path(Path(frame.f_code.co_filename))}:{line}"


def _workloads() -> Iterator[type[Workload]]:
    """Every workload that this process has loaded."""
    kinds = Workload.__subclasses__()
    while kinds:
        kind = kinds.pop()
        yield kind
        kinds += kind.__subclasses__()


def _ownership(frame: FrameType, packages: set[str]) -> int:
    """How much a call is the user's own: most in the working folder.

    Then come other code that is not installed, the installed `packages` of workloads, and the
    workloads that ship.
    """
    file, module = Path(frame.f_code.co_filename), str(frame.f_globals.get("__name__", ""))
    package = module.partition(".")[0]
    if package in OUR_PACKAGES:
        return 1 if module.startswith("trainers.workloads.") else 0
    if str(file).startswith("<"):
        return 0
    if {"site-packages", "dist-packages"} & {*file.parts} or file.is_relative_to(STANDARD_LIBRARY):
        return 2 if package in packages else 0
    return 4 if file.is_relative_to(Path.cwd()) else 3


def training_error(error: BaseException) -> TrainingError:
    """The error of a user's code as the error of the run, with its traceback for the log."""
    failure = TrainingError(format_error(error))
    failure.traceback = traceback_of(error)
    return failure


def traceback_of(error: BaseException) -> str:
    """The whole traceback of an error in the user's code; empty for errors that name the cause."""
    if isinstance(error, TrainingError) and error.traceback:
        return error.traceback
    if isinstance(error, HeliostatError) and error.__cause__ is None:
        return ""
    return "".join(traceback.format_exception(error))


def log_traceback(folder: Path, error: BaseException) -> None:
    """Append the traceback of a run's or trial's error to the log of the run in `folder`."""
    text = traceback_of(error)
    if text:
        with (folder / LOG).open("a") as log:
            log.write(f"{text}\n")


def failure_reason(error: BaseException, folder: Path) -> HeliostatError:
    """Why the workers of the run in `folder` are not started again, in one line.

    `error` is the exception that `fit` raised.
    """
    failures: Mapping[int, Exception] = getattr(error, "worker_failures", {})
    for failure in failures.values():
        if isinstance(failure, HeliostatError):
            return failure
    for failure in failures.values():
        if isinstance(failure, OutageError):
            return TrainingError(f"{failure}; it failed too often (scale.max_restarts)")
    stall = last_stall(folder / STALLS, failures)
    if stall:
        return TrainingError(f"{stall}; it was lost too often (scale.max_restarts)")
    if failures:
        rank, failure = next(iter(failures.items()))
        return TrainingError(f"worker {rank} was lost too often: {type(failure).__name__}")
    return TrainingError(f"{type(error).__name__}: {error}".splitlines()[0])
