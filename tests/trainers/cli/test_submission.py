"""The jobs that `heliostat submit` sends for the verbs with a spec."""

import argparse
import subprocess
from pathlib import Path

import pytest

from cluster.base.errors import SpecError
from cluster.jobs.job import Submission
from tuning.cli.parser import build_parser


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def submission_of(line: str) -> Submission:
    """The job that `heliostat submit` sends for a command."""
    words = tuple(line.split())
    args: argparse.Namespace = build_parser().parse_args(words)
    submission: Submission = args.plan(args, words)
    return submission


@pytest.mark.parametrize("verb", ["train", "sweep", "scaling --workers 1,2"])
def test_verbs_with_a_name_get_one(verb: str, folder: Path) -> None:
    named = submission_of(f"{verb} digits --name mine")
    assert named.name == "mine"
    assert named.argv == (*verb.split(), "digits", "--name", "mine")
    unnamed = submission_of(f"{verb} digits")
    assert unnamed.argv == (*verb.split(), "digits", "--name", unnamed.name)
    assert unnamed.name != submission_of(f"{verb} digits").name
    assert unnamed.exclude_patterns == ("/runs",)


@pytest.mark.parametrize("verb", ["plan", "data"])
def test_the_job_of_a_verb_without_a_name_has_one(verb: str, folder: Path) -> None:
    submission = submission_of(f"{verb} digits")
    assert submission.argv == (verb, "digits")
    assert submission.name.startswith(f"digits-{verb}-")


def test_a_resumed_run_is_found_by_its_name_on_the_cluster(folder: Path) -> None:
    submission = submission_of("train --resume runs/mine")
    assert (submission.name, submission.argv) == ("mine", ("train", "--resume", "mine"))
    there = submission_of("sweep --resume /shared/runs/mine")
    assert (there.name, there.argv) == ("mine", ("sweep", "--resume", "/shared/runs/mine"))


def test_a_spec_file_is_named_relative_to_the_working_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "specs").mkdir()
    (folder / "specs/mine.yaml").write_text("workload: vision\n")
    submission = submission_of(f"plan {folder}/specs/mine.yaml")
    assert submission.argv == ("plan", "specs/mine.yaml")
    assert submission.required_files == (Path("specs/mine.yaml"),)
    monkeypatch.chdir(folder / "specs")
    (folder / "other.yaml").write_text("workload: vision\n")
    with pytest.raises(SpecError, match="is not in the working folder, and only that is sent"):
        submission_of("data ../other.yaml")


def test_a_mistake_in_the_spec_is_an_error_before_anything_is_sent(folder: Path) -> None:
    with pytest.raises(SpecError, match=r"^train\.global_batch: "):
        submission_of("plan digits --set train.global_batch=0")
    with pytest.raises(SpecError, match=r"^train: needs a spec, or --resume NAME"):
        submission_of("train")


def test_data_that_only_this_machine_has_is_refused(folder: Path) -> None:
    subprocess.run(["git", "init", "-q"], check=True)
    (folder / "images").mkdir()
    (folder / ".gitignore").write_text("images\n")
    with pytest.raises(SpecError, match=r"^data\.source: images is on this machine and is not"):
        submission_of("data digits --set data.source=images")
    (folder / ".gitignore").write_text("")
    (folder / "images/one.png").touch()
    assert submission_of("train digits --set data.source=images --name mine").name == "mine"
    assert (
        submission_of(f"train digits --set data.source={folder}/gone --name shared").name
        == "shared"
    )
