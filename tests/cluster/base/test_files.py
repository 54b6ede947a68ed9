"""Files and folders are complete or absent."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.base.files import cache_folder, commit_folder, write_atomic


def test_write_atomic_replaces_the_file_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_atomic(path, "first")
    write_atomic(path, "zweite Fassung: ü\n")
    assert path.read_bytes() == "zweite Fassung: ü\n".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_readers_see_the_old_or_the_new_text_but_no_mixture(tmp_path: Path) -> None:
    """While another process replaces a file of a megabyte again and again."""
    path = tmp_path / "state"
    texts = {"a" * 1_000_000, "b" * 1_000_000}
    write_atomic(path, max(texts))
    code = (
        "from pathlib import Path; from cluster.base.files import write_atomic\n"
        f"path = Path({str(path)!r})\n"
        "for _ in range(20):\n"
        "    write_atomic(path, 'a' * 1_000_000); write_atomic(path, 'b' * 1_000_000)\n"
    )
    seen = set()
    with subprocess.Popen([sys.executable, "-c", code]) as writer:
        while writer.poll() is None:
            seen.add(path.read_text())
    assert writer.returncode == 0
    assert seen <= texts
    assert len(seen) == 2


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "state"
    write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "new \ud800")  # a lone surrogate has no UTF-8
    assert path.read_text() == "old"


def test_commit_folder_renames_a_tree(tmp_path: Path) -> None:
    building, final = tmp_path / ".building", tmp_path / "final"
    (building / "inner").mkdir(parents=True)
    (building / "inner" / "file").write_text("content")
    commit_folder(building, final)
    assert (final / "inner" / "file").read_text() == "content"
    assert list(tmp_path.iterdir()) == [final]


def test_commit_folder_does_not_replace_a_folder_with_content(tmp_path: Path) -> None:
    building, final = tmp_path / ".building", tmp_path / "final"
    for folder, content in ((building, "new"), (final, "old")):
        folder.mkdir()
        (folder / "file").write_text(content)
    with pytest.raises(OSError, match="not empty"):
        commit_folder(building, final)
    assert (final / "file").read_text() == "old"
    assert (building / "file").read_text() == "new"


def test_only_this_user_can_enter_the_cache_folder() -> None:
    folder = cache_folder()
    assert folder == cache_folder()
    status = folder.stat()
    assert status.st_uid == os.getuid()
    assert status.st_mode & 0o077 == 0


def test_threads_may_write_the_same_file_at_the_same_time(tmp_path: Path) -> None:
    """With one temporary name per process, a thread renamed the file of another one."""
    path = tmp_path / "state"
    texts = [letter * 100_000 for letter in "abcd"]
    with ThreadPoolExecutor(len(texts)) as pool:
        for _ in range(20):
            list(pool.map(lambda text: write_atomic(path, text), texts))
            assert path.read_text() in texts
    assert list(tmp_path.iterdir()) == [path]
