"""Which verbs a cluster can be asked for, and what goes along with them."""

import argparse
import subprocess
from pathlib import Path

import pytest

from cluster.base.errors import SpecError
from cluster.jobs.ray_jobs import Submission
from tuning.cli.parser import build_parser


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def asked(line: str) -> Submission:
    """What `heliostat submit` makes of a command."""
    words = tuple(line.split())
    args: argparse.Namespace = build_parser().parse_args(words)
    planned: Submission = args.plan(args, words)
    return planned


@pytest.mark.parametrize("verb", ["train", "sweep", "scaling --workers 1,2"])
def test_what_is_kept_by_its_name_gets_one(verb: str, folder: Path) -> None:
    named = asked(f"{verb} digits --name mine")
    assert named.name == "mine"
    assert named.words == (*verb.split(), "digits", "--name", "mine")
    unnamed = asked(f"{verb} digits")
    assert unnamed.words == (*verb.split(), "digits", "--name", unnamed.name)
    assert unnamed.name != asked(f"{verb} digits").name
    assert unnamed.exclude_patterns == ("/runs",)


@pytest.mark.parametrize("verb", ["plan", "data"])
def test_what_is_not_has_a_name_as_a_job(verb: str, folder: Path) -> None:
    planned = asked(f"{verb} digits")
    assert planned.words == (verb, "digits")
    assert planned.name.startswith(f"digits-{verb}-")


def test_what_is_resumed_is_found_by_its_name_there(folder: Path) -> None:
    planned = asked("train --resume runs/mine")
    assert (planned.name, planned.words) == ("mine", ("train", "--resume", "mine"))
    there = asked("sweep --resume /shared/runs/mine")
    assert (there.name, there.words) == ("mine", ("sweep", "--resume", "/shared/runs/mine"))


def test_a_spec_goes_along_by_its_place_in_the_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "specs").mkdir()
    (folder / "specs/mine.yaml").write_text("workload: vision\n")
    planned = asked(f"plan {folder}/specs/mine.yaml")
    assert planned.words == ("plan", "specs/mine.yaml")
    assert planned.required_files == (Path("specs/mine.yaml"),)
    monkeypatch.chdir(folder / "specs")
    (folder / "other.yaml").write_text("workload: vision\n")
    with pytest.raises(SpecError, match="is not in the working folder, which is what is sent"):
        asked("data ../other.yaml")


def test_a_mistake_is_told_before_anything_is_sent(folder: Path) -> None:
    with pytest.raises(SpecError, match=r"^train\.global_batch: "):
        asked("plan digits --set train.global_batch=0")
    with pytest.raises(SpecError, match=r"^train: needs a spec, or --resume NAME"):
        asked("train")


def test_data_that_only_this_machine_has_is_refused(folder: Path) -> None:
    subprocess.run(["git", "init", "-q"], check=True)
    (folder / "images").mkdir()
    (folder / ".gitignore").write_text("images\n")
    with pytest.raises(SpecError, match=r"^data\.source: images is on this machine and is not"):
        asked("data digits --set data.source=images")
    (folder / ".gitignore").write_text("")
    (folder / "images/one.png").touch()
    assert asked("train digits --set data.source=images --name mine").name == "mine"
    assert asked(f"train digits --set data.source={folder}/gone --name shared").name == "shared"
