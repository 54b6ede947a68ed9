"""Which files of a folder are listed: repositories in it, links, rules from above, odd names."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from cluster.base.errors import SpecError
from cluster.jobs.folder_files import files_below

IDENTITY = ("-c", "user.name=me", "-c", "user.email=me@example.org")


def git(folder: Path, *words: str) -> None:
    local = ("-c", "protocol.file.allow=always")
    subprocess.run(["git", "-C", folder, *IDENTITY, *local, *words], check=True)


def write(folder: Path, *names: str, rules: str = "", text: str = "1") -> None:
    """Files of these names, all with the same text, and the folder's own .gitignore."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    if rules:
        (folder / ".gitignore").write_text(rules)


def repository(folder: Path, *names: str, rules: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    git(folder, "init", "-q")
    write(folder, *names, rules=rules)
    git(folder, "add", ".")
    git(folder, "commit", "-q", "--allow-empty", "-m", "all")
    return folder


def listed(folder: Path, *left_out: str) -> list[str]:
    return [str(path) for path in files_below(folder, lambda path: str(path) in left_out)]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return repository(tmp_path / "project", "train.py")


def test_files_of_submodules(project: Path, tmp_path: Path) -> None:
    """Of submodules in submodules, too, and their new files; each obeys its own rules."""
    inner = repository(tmp_path / "inner", "deep.py")
    library = repository(tmp_path / "library", "net.py", rules="*.bin\n")
    git(library, "submodule", "--quiet", "add", str(inner), "inner")
    git(library, "commit", "-q", "-m", "inner")
    git(project, "submodule", "--quiet", "add", str(library), "lib")
    git(project, "submodule", "--quiet", "update", "--init", "--recursive")
    write(project, "lib/new.py", "lib/big.bin")
    own = [".gitignore", ".gitmodules", "inner/deep.py", "net.py", "new.py"]
    assert listed(project) == [".gitmodules", *(f"lib/{name}" for name in own), "train.py"]
    (project / "lib/.git").unlink()  # a copy of the folder whose own repository is elsewhere
    assert "lib/net.py" in listed(project)


def test_a_submodule_that_is_not_checked_out_is_an_error(project: Path, tmp_path: Path) -> None:
    library = repository(tmp_path / "library", "net.py")
    git(project, "submodule", "--quiet", "add", str(library), "lib")
    git(project, "commit", "-q", "-m", "library")
    subprocess.run(["git", "clone", "-q", project, tmp_path / "clone"], check=True)
    with pytest.raises(SpecError, match=r"^lib: is a submodule that is not checked out; run git"):
        listed(tmp_path / "clone")
    assert listed(tmp_path / "clone", "lib") == [".gitmodules", "train.py"]


@pytest.mark.parametrize("in_repository", [True, False])
def test_files_of_other_repositories_in_the_folder(in_repository: bool, tmp_path: Path) -> None:
    folder = tmp_path / "project"
    repository(folder) if in_repository else folder.mkdir()
    write(folder, "train.py")
    repository(folder / "clone", "net.py", rules="*.bin\n")
    write(folder, "clone/big.bin", "clone/notes.txt", "ignored/x")
    assert listed(folder, "ignored/x") == [
        "clone/.gitignore",
        "clone/net.py",
        "clone/notes.txt",
        "train.py",
    ]
    git(folder / "clone", "worktree", "add", "-q", "../tree")
    assert "tree/net.py" in listed(folder)


@pytest.mark.parametrize("with_git", [True, False])
def test_files_behind_links_to_folders(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_git: bool
) -> None:
    """By the name of the link; a link to a file is that file, and one to nothing is none."""
    write(tmp_path, "shared/a/net.py", "v3/x.npy")
    (project / "lib").symlink_to(tmp_path / "shared")
    (tmp_path / "shared/data").symlink_to("../v3")
    (project / "again.py").symlink_to("train.py")
    (project / "gone.py").symlink_to("nothing")
    (project / "round.py").symlink_to("round.py")
    os.mkfifo(project / "pipe")
    if not with_git:
        shutil.rmtree(project / ".git")
        monkeypatch.setenv("PATH", "/nowhere")
    assert listed(project) == ["again.py", "lib/a/net.py", "lib/data/x.npy", "train.py"]
    assert listed(project, "lib/data") == ["again.py", "lib/a/net.py", "train.py"]
    assert listed(project, "lib") == ["again.py", "train.py"]


def test_a_link_to_what_contains_it_is_an_error(project: Path) -> None:
    write(project, "a/x", "b/y")
    (project / "a/b").symlink_to("../b")
    assert listed(project) == ["a/b/y", "a/x", "b/y", "train.py"]
    for target in (".", "..", "/", "../b/a"):
        link = project / "b/a"
        link.unlink(missing_ok=True)
        link.symlink_to("../a" if target == "../b/a" else target)
        with pytest.raises(SpecError, match=r"b/a|a/b.*: is a link to a folder that contains it"):
            listed(project)
        assert listed(project, "b/a", "a/b") == ["a/x", "b/y", "train.py"]


def test_a_folder_that_its_repository_ignores_obeys_its_own_rules(tmp_path: Path) -> None:
    home = repository(tmp_path / "home", ".profile", rules="*\n!.gitignore\n")
    write(home, "work/lib/net.py", "work/big.bin", "work/train.py")
    write(home / "work", rules="*.bin\n")
    assert listed(home / "work") == [".gitignore", "lib/net.py", "train.py"]
    assert listed(home / "work/lib") == ["net.py"]
    git(home, "add", "-f", "work/train.py", "work/big.bin")  # tracked there, in spite of the rules
    assert listed(home / "work") == [".gitignore", "big.bin", "lib/net.py", "train.py"]
    (home / "other").mkdir()
    (home / "other/link").symlink_to("../work/lib")
    assert listed(home / "other") == ["link/net.py"]


def test_names_that_are_no_text(project: Path) -> None:
    """Line ends, quotes and bytes that are not UTF-8."""
    names = [b"caf\xe9.txt", b"two\nlines.txt", b'"quoted".txt', "über.txt".encode()]
    for name in names:
        (project / os.fsdecode(name)).touch()
    assert {os.fsencode(name) for name in listed(project)} == {*names, b"train.py"}


def test_the_folder_counts_and_not_what_git_was_told_in_variables(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = repository(tmp_path / "other", "strange.py")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))  # as in a hook of the other repository
    monkeypatch.setenv("GIT_INDEX_FILE", str(other / ".git/index"))
    assert listed(project) == ["train.py"]


def test_a_repository_that_git_cannot_read_is_an_error(project: Path) -> None:
    (project / ".git/index").write_bytes(b"broken")
    with pytest.raises(SpecError, match=r"^git: .*index file"):
        listed(project)


def test_deleted_and_conflicting_files(project: Path) -> None:
    """A file is listed once, also while a merge has three versions of it."""
    git(project, "checkout", "-q", "-b", "other")
    write(project, "train.py", "gone.py", text="2")
    git(project, "add", ".")
    git(project, "commit", "-q", "-m", "other")
    git(project, "checkout", "-q", "-")
    write(project, "train.py", text="3")
    git(project, "commit", "-q", "-a", "-m", "mine")
    assert subprocess.run(["git", "-C", project, *IDENTITY, "merge", "-q", "other"]).returncode
    (project / "gone.py").unlink()
    assert listed(project) == ["train.py"]
