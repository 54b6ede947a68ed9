"""What makes two processes belong to one session, and what does not."""

import os
import shutil
from pathlib import Path

import pytest

from cluster.session import session_key
from cluster.session.session_key import SESSION_ENV_VAR, session_folder


@pytest.mark.parametrize(
    "name", ["OPENBLAS_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "RAY_TMPDIR", "PYTHONPATH", "HOME"]
)
def test_a_variable_that_cannot_be_changed_later_makes_another_session(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = session_key.session_key()
    monkeypatch.setenv(name, "other")
    assert session_key.session_key() != before


@pytest.mark.parametrize("name", ["MLFLOW_TRACKING_URI", "RAY_ADDRESS", "MY_OWN", "TERM"])
def test_a_variable_that_is_passed_on_does_not(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = session_key.session_key()
    monkeypatch.setenv(name, "other")
    assert session_key.session_key() == before


def test_another_version_of_the_code_makes_another_session(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    copy = tmp_path / "cluster"
    shutil.copytree(session_key.HOME / "cluster" / "session", copy / "session")
    monkeypatch.setattr(session_key, "HOME", tmp_path)
    before = session_key.session_key()
    (copy / "session" / "session.py").write_text("changed = True\n")
    assert session_key.session_key() != before


def test_there_is_no_session_where_it_cannot_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    folder = session_folder()
    assert folder is not None
    assert folder.parent == Path(f"/tmp/heliostat-{os.getuid()}/s")
    # A Unix socket's path is limited.
    long = tmp_path / ("long" * 10)
    long.mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(long))
    assert session_folder() is None
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    monkeypatch.setenv(SESSION_ENV_VAR, "off")
    assert session_folder() is None
