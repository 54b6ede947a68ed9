"""Which failures are the user's code's, and which are those of storage and devices."""

import errno
import importlib.util
import pickle
import socket
import ssl
import sys
import traceback
import urllib.error
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from cluster.base.errors import CheckpointError, HeliostatError, SpecError, TrainingError
from trainers.run_folder import LOG
from trainers.runs.failure_policy import (
    OutageError,
    PeerLostError,
    decide_retry,
    failure_reason,
    format_error,
    is_outage,
    log_traceback,
    worker_failure,
)


def raised(error: BaseException, cause: BaseException | None = None) -> BaseException:
    error.__cause__ = cause
    return error


class ClientError(Exception):
    """As botocore raises it for every answer of S3 that is an error."""

    def __init__(self, code: str, status: int) -> None:
        super().__init__(f"An error occurred ({code}) when calling the GetObject operation")
        self.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}


class ServiceUnavailable(Exception):  # noqa: N818
    """As in google.api_core."""

    code = 503


class ReadTimeout(Exception):  # noqa: N818
    """As in httpx."""


ReadTimeout.__module__ = "httpx"

OUTAGES = {
    "stale NFS handle": OSError(errno.ESTALE, "Stale file handle", "/data/x"),
    "disk": OSError(errno.EIO, "Input/output error"),
    "full disk": OSError(errno.ENOSPC, "No space left on device"),
    "quota": OSError(errno.EDQUOT, "Disk quota exceeded"),
    "reset": ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
    "pipe": BrokenPipeError(),
    "timeout": TimeoutError("timed out"),
    "name server": socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"),
    "mount": OSError(errno.ENOTCONN, "Transport endpoint is not connected"),
    "TLS": ssl.SSLEOFError(8, "EOF occurred in violation of protocol"),
    "S3 by pyarrow": OSError(
        "When reading information for key 'a' in bucket 'b': AWS Error SLOW_DOWN during HeadObject "
        "operation: Please reduce your request rate."
    ),
    "S3 by pyarrow, 503": OSError("AWS Error UNKNOWN (HTTP status 503) during PutObject operation"),
    "network by pyarrow": OSError(
        "AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 28, Timeout was reached"
    ),
    "S3 by s3fs": OSError(errno.EBUSY, "Please reduce your request rate."),
    "S3 by botocore": ClientError("SlowDown", 503),
    "GCS": ServiceUnavailable("try again"),
    "HTTP": urllib.error.HTTPError("http://x", 503, "Service Unavailable", None, None),  # type: ignore[arg-type]
    "URL": urllib.error.URLError(ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")),
    "httpx": ReadTimeout("The read operation timed out"),
    "HDF5": OSError("Can't read data (file read failed: errno = 5, error message = 'x', buf = 1)"),
    "safetensors": SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    ),
    "mapped file": RuntimeError("unable to mmap 512 bytes from file <x>: Input/output error (5)"),
    "ECC": RuntimeError("CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors ..."),
    "launch": torch.AcceleratorError("CUDA error: unspecified launch failure"),
    "AMD": RuntimeError("HIP error: unknown error"),
    "GPU is gone": RuntimeError("No CUDA GPUs are available"),
    "cuDNN": RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    "a save": raised(
        CheckpointError("s3://x: the disk is full"), OSError(errno.ENOSPC, "No space left")
    ),
}

MISTAKES = {
    "key": KeyError("no such feature"),
    "value": ValueError("the time-out must be positive: connection"),
    "file": FileNotFoundError(errno.ENOENT, "No such file or directory", "/data/x"),
    "permission": PermissionError(errno.EACCES, "Permission denied"),
    "read-only": OSError(errno.EROFS, "Read-only file system"),
    "S3 refuses": OSError("AWS Error ACCESS_DENIED during HeadObject operation: No response body."),
    "no bucket": OSError("AWS Error NO_SUCH_BUCKET during ListObjectsV2 operation"),
    "S3 refuses, botocore": ClientError("AccessDenied", 403),
    "certificate": ssl.SSLCertVerificationError(1, "certificate verify failed"),
    "assertion on a GPU": RuntimeError("CUDA error: device-side assert triggered"),
    "GPU memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "kernel": RuntimeError("CUDA error: no kernel image is available for execution on the device"),
    "shapes": RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
    "loss": TrainingError("the loss is nan at step 3"),
    "spec": SpecError("train.precision: fp8 needs the package torchao"),
    "damaged": CheckpointError("x: manifest.json is damaged"),
    "restarts that were used up": raised(
        TrainingError("OSError: Stale file handle; it failed too often"),
        OSError(errno.ESTALE, "Stale file handle"),
    ),
}


@pytest.mark.parametrize("name", OUTAGES)
def test_failures_of_storage_and_devices_are_restarted(name: str) -> None:
    failure = worker_failure(caught(OUTAGES[name]), preempted=lambda: False)
    assert isinstance(failure, OutageError)
    assert decide_retry({0: failure, 1: PeerLostError("gloo")}) == "count"


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_the_run_at_once(name: str) -> None:
    failure = worker_failure(caught(MISTAKES[name]), preempted=lambda: False)
    assert isinstance(failure, HeliostatError)
    assert decide_retry({0: failure, 1: PeerLostError("gloo")}) == "raise"


def caught(error: BaseException) -> Any:
    """The error, raised once and caught."""
    try:
        raise error from error.__cause__
    except type(error) as same:
        return same


def test_an_outage_that_the_code_had_handled_is_not_its_error() -> None:
    try:
        try:
            raise ConnectionResetError
        except ConnectionResetError:
            {}["fallback"]
    except KeyError as error:
        handled = error
    assert not is_outage(handled)


def test_an_outage_in_one_of_many_writers_is_found() -> None:
    """PyTorch's exception has the errors of all workers, and no cause."""

    class CheckpointException(BaseException):
        failures = {1: (OSError(errno.EIO, "Input/output error"), None)}

    assert is_outage(raised(CheckpointError("x: cannot be written"), CheckpointException()))


def test_restarts_that_are_used_up_end_with_the_outage(tmp_path: Path) -> None:
    error = RuntimeError("Ray Train gave up")
    error.worker_failures = {  # type: ignore[attr-defined]
        1: PeerLostError("gloo"),
        0: OutageError("OSError: [Errno 116] Stale file handle (model.py:3)"),
    }
    assert str(failure_reason(error, tmp_path)) == (
        "OSError: [Errno 116] Stale file handle (model.py:3); it failed too often "
        "(scale.max_restarts)"
    )


def load(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 2)

    def forward(self, x):
        return self.inner(x)  # line 11

def call(library=lambda f: f()):
    return library(lambda: Net()(torch.ones(1, 4)))  # line 14
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Writes a module into a folder, and returns the line on the error of its `call`."""
    monkeypatch.chdir(tmp_path)

    def error_of(folder: str, name: str, *arguments: Any) -> str:
        path = tmp_path / folder / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(MODEL)
        monkeypatch.delitem(sys.modules, name, raising=False)
        module = load(path, name)
        with pytest.raises((RuntimeError, KeyError)) as failure:
            module.call(*arguments)
        return format_error(failure.value)

    return error_of


def test_an_error_in_torch_names_the_users_line(own: Callable[..., str]) -> None:
    text = own(".", "mine")
    assert (
        text == "RuntimeError: mat1 and mat2 shapes cannot be multiplied (1x4 and 3x2) (mine.py:11)"
    )


def test_an_error_in_an_installed_library_names_the_users_line(own: Callable[..., str]) -> None:
    """One that calls no code of the user."""

    assert own("deep", "mine2", installed("def run(f): raise KeyError(f)")["run"]).endswith(
        "(deep/mine2.py:14)"
    )


def installed(source: str) -> dict[str, Any]:
    """The names of a module with this source in an installed package."""
    names: dict[str, Any] = {"__name__": "lib.module"}
    exec(compile(source, "/v/lib/python3/site-packages/lib/module.py", "exec"), names)
    return names


def test_the_whole_traceback_is_for_the_log(own: Callable[..., str], tmp_path: Path) -> None:
    own(".", "mine3")
    try:
        sys.modules["mine3"].call()
    except RuntimeError as error:
        failure = worker_failure(error, preempted=lambda: False)
        expected = "".join(traceback.format_exception(error))
    log_traceback(tmp_path, pickle.loads(pickle.dumps(failure)))  # it comes from another process
    text = (tmp_path / LOG).read_text()
    assert text == f"{expected}\n"
    assert "return self.inner(x)  # line 11" in text
    assert "in forward" in text


def test_an_error_that_says_everything_has_no_traceback_in_the_log(tmp_path: Path) -> None:
    log_traceback(tmp_path, TrainingError("the loss is nan at step 3"))
    assert not (tmp_path / LOG).exists()
