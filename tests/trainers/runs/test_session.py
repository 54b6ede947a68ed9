"""The code that goes to a cluster's workers, signals, and requests of other processes."""

import io
import signal
import subprocess
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.base.errors import SpecError
from cluster.session.ray_session import ray_session
from trainers.run_folder import WHOLE, request_stop, stop_requests, withdraw_stop
from trainers.runs import session
from trainers.runs.session import code_packer, interrupted_on_request, stop_on_signal
from trainers.spec import RunSpec, resolve


def test_code_that_git_ignores_goes_to_the_workers(own_folder: Path) -> None:
    """As far as the workload needs it; what runs write does not."""
    subprocess.run(["git", "init", "-q"], check=True)
    (own_folder / ".gitignore").write_text("_*.py\n")
    for name in ("_version.py", "_other.py", "runs/a/model.bin", "notes.txt"):
        (own_folder / name).parent.mkdir(parents=True, exist_ok=True)
        (own_folder / name).write_text("NUMBER = 1")
    source = (own_folder / "spirals.py").read_text()
    (own_folder / "spirals.py").write_text(f"import _version\n{source}")
    pack = code_packer(resolve({"workload": "spirals:Spirals"}, RunSpec)[0])
    assert pack is not None
    with zipfile.ZipFile(io.BytesIO(pack())) as package:
        assert set(package.namelist()) == {".gitignore", "_version.py", "notes.txt", "spirals.py"}
    assert code_packer(resolve({"workload": "vision"}, RunSpec)[0]) is None


def test_code_that_cannot_be_sent_is_told_before_a_cluster_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)

    def pack() -> bytes:
        raise SpecError("net.py: cannot be read")

    with pytest.raises(SpecError, match="cannot be read"), ray_session("127.0.0.1:1", pack):
        pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_ctrl_c_asks_to_stop_and_the_second_one_interrupts(
    number: signal.Signals,
) -> None:
    with stop_on_signal() as stop:
        assert not stop.is_set()
        signal.raise_signal(number)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)


def test_a_request_interrupts_once_as_ctrl_c_does(
    tmp_path: Path, wait_until: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "STOP_POLL_S", 0.01)
    with stop_on_signal() as stop, interrupted_on_request(tmp_path):
        request_stop(tmp_path, "0007")
        assert not stop.wait(0.05), "a trial's request is not the run's"
        request_stop(tmp_path)
        wait_until(stop.is_set)
        assert stop_requests(tmp_path) == {"0007"}
        threading.Event().wait(0.05)  # a second interruption would raise KeyboardInterrupt


def test_a_request_of_before_is_withdrawn(tmp_path: Path) -> None:
    assert stop_requests(tmp_path) == set()
    withdraw_stop(tmp_path)
    request_stop(tmp_path)
    assert stop_requests(tmp_path) == {WHOLE}
    before = signal.getsignal(signal.SIGINT)
    with interrupted_on_request(tmp_path):
        assert stop_requests(tmp_path) == set()
    assert signal.getsignal(signal.SIGINT) is before
