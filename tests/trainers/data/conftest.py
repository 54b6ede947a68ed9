"""Data sets of the tests are decoded in folders of their own."""

import tempfile
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep decoded splits of these tests out of the machine's cache."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
