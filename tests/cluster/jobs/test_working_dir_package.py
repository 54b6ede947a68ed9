"""Which files of a working folder are sent to a cluster."""

import io
import os
import subprocess
import zipfile
from pathlib import Path

import pytest

from cluster.base.errors import SpecError
from cluster.jobs import working_dir_package
from cluster.jobs.working_dir_package import build_package, list_packaged_files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A project with ignore rules in two folders."""
    for name in ("train.py", "lib/net.py", "lib/big.bin", "runs/a/best.yaml", "notes.txt", ".env"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / ".gitignore").write_text("/runs\n.env\n")
    (tmp_path / "lib" / ".gitignore").write_text("*.bin\n")
    for name in (".venv/x.py", "lib/__pycache__/net.pyc"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def names(paths: list[Path]) -> set[str]:
    return {str(path) for path in paths if path.name != ".gitignore"}


@pytest.mark.parametrize("repository", [False, True])
def test_files_that_git_ignores_are_left_out(folder: Path, repository: bool) -> None:
    """In a repository, and in a folder outside of any."""
    if repository:
        subprocess.run(["git", "init", "-q", folder], check=True)
        subprocess.run(["git", "-C", folder, "add", "-f", "lib/big.bin"], check=True)
    # A file that was added in spite of a rule is tracked.
    tracked = {"lib/big.bin"} if repository else set()
    assert names(list_packaged_files(folder)) == {"train.py", "lib/net.py", "notes.txt"} | tracked
    assert names(list_packaged_files(folder, ["*.txt", "lib"])) == {"train.py"}


def test_a_subfolder_obeys_the_rules_of_its_repository(folder: Path) -> None:
    subprocess.run(["git", "init", "-q", folder], check=True)
    (folder / ".gitignore").write_text("net.py\n")
    assert names(list_packaged_files(folder / "lib")) == set()


def test_a_pattern_with_a_slash_matches_the_top_folder_only(folder: Path) -> None:
    (folder / "lib" / "notes.txt").touch()
    assert names(list_packaged_files(folder, ["/notes.txt"])) >= {"lib/notes.txt"}
    assert "notes.txt" not in names(list_packaged_files(folder, ["/notes.txt"]))


def test_without_git_ignore_rules_are_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SpecError, match=r"git: is needed"):
        list_packaged_files(folder)
    for rules in folder.rglob(".gitignore"):
        rules.unlink()
    assert "lib/big.bin" in names(list_packaged_files(folder))


def test_a_package_is_named_by_its_content(folder: Path) -> None:
    spec = Path("runs/a/best.yaml")
    package = build_package(folder, required_files=[spec])
    with zipfile.ZipFile(io.BytesIO(package.data)) as archive:
        assert set(archive.namelist()) == {path.as_posix() for path in package.files}
        assert archive.read("runs/a/best.yaml") == b"runs/a/best.yaml"
    os.utime(folder / "train.py", (0, 0))
    assert build_package(folder, required_files=[spec]).uri == package.uri
    (folder / "train.py").write_text("other")
    assert build_package(folder, required_files=[spec]).uri != package.uri


def test_files_with_keys_are_refused(folder: Path) -> None:
    (folder / ".gitignore").write_text("/runs\n")
    (folder / ".env").write_text("API_TOKEN=0123456789abcdef\n")
    with pytest.raises(SpecError, match=r"^\.env: a secret, in line 1\nnothing was sent"):
        build_package(folder)
    assert ".env" not in names(list(build_package(folder, exclude_patterns=[".env"]).files))


def test_for_a_folder_that_is_too_large_the_largest_files_are_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(working_dir_package, "MAX_PACKAGE_BYTES", 3 << 20)
    for mebibytes in (1, 2, 3):
        (folder / f"{mebibytes}.npy").write_bytes(bytes(mebibytes << 20))
    with pytest.raises(SpecError) as error:
        build_package(folder)
    lines = str(error.value).splitlines()
    assert lines[:3] == ["3.npy: 3.0 MiB", "2.npy: 2.0 MiB", "1.npy: 1.0 MiB"]
    assert "6.0 MiB, more than the 3.0 MiB" in lines[-1]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (b"caf\xe9.txt", r"caf\xe9.txt: the name is not UTF-8"),
        (b"lib/a\\b.txt", r"lib/a\b.txt: Ray does not unpack files with such names"),
        (b"c:net.py", "c:net.py: Ray does not unpack files with such names"),
    ],
)
def test_files_that_would_not_arrive_are_refused(folder: Path, name: bytes, reason: str) -> None:
    (folder / os.fsdecode(name)).touch()
    with pytest.raises(SpecError) as error:
        build_package(folder)
    assert str(error.value).splitlines()[0] == reason
    assert "nothing was sent; rename or move" in str(error.value)
    pattern = f"/{os.fsdecode(name)}".replace("\\", "?")
    assert "train.py" in names(list(build_package(folder, exclude_patterns=[pattern]).files))


def test_files_of_other_repositories_and_behind_links_are_sent(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    subprocess.run(["git", "init", "-q", folder], check=True)
    subprocess.run(["git", "init", "-q", folder / "clone"], check=True)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "sizes.json").write_text("[8, 16]")
    (folder / "clone/made").symlink_to(elsewhere)
    (folder / "clone/net.py").touch()
    with zipfile.ZipFile(io.BytesIO(build_package(folder).data)) as archive:
        assert {"clone/net.py", "train.py"} < set(archive.namelist())
        assert archive.read("clone/made/sizes.json") == b"[8, 16]"


def test_a_folder_that_is_too_large_is_not_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Such as the one that a link to all of somebody's data leads to."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    with (elsewhere / "data.bin").open("wb") as file:
        file.truncate(1 << 40)
    (folder / "data").symlink_to(elsewhere)
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"reads {path}"))
    monkeypatch.setattr(working_dir_package, "find_secrets", lambda *_: pytest.fail("reads"))
    with pytest.raises(SpecError, match=r"^data/data\.bin: 1,048,576\.0 MiB\n"):
        build_package(folder)


def test_a_file_that_cannot_be_read_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(SpecError, match=r"/\.gitignore: cannot be read: Permission denied$"):
        build_package(folder)


def test_heliostats_own_packages_are_left_out() -> None:
    """Sent from Heliostat's checkout, they would hide those that the cluster has installed."""
    files = list_packaged_files(working_dir_package.HELIOSTAT_ROOT)
    assert not {path.parts[0] for path in files} & {"cluster", "trainers", "tuning", "heliostat"}
    assert Path("README.md") in files
