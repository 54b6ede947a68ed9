"""The token is created once, and only its owner may read it."""

import re
from pathlib import Path

import pytest

from cluster.connection.auth_token import auth_headers, ensure_token, read_token


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


def test_it_is_created_once_and_private() -> None:
    assert read_token() is None
    assert auth_headers() == {}
    path = ensure_token()
    token = path.read_text()
    assert re.fullmatch("[0-9a-f]{64}", token)
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)  # as Ray creates it
    assert ensure_token().read_text() == token
    assert path.stat().st_mode & 0o777 == 0o600
    assert auth_headers() == {"Authorization": f"Bearer {token}"}


def test_the_environment_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ensure_token()
    (tmp_path / "other").write_text("from a file\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "other"))
    assert read_token() == "from a file"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "given")
    assert read_token() == "given"
