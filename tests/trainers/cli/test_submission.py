"""The jobs that `heliostat submit` sends for the verbs with a spec."""

import argparse
import subprocess
import sys
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
    (folder / "other.yaml").write_text("workload: vision\n")
    (folder / "specs/linked.yaml").symlink_to("../other.yaml")
    monkeypatch.chdir(folder / "specs")
    with pytest.raises(SpecError, match="is not in the working folder, and only that is sent"):
        submission_of("data ../other.yaml")
    assert submission_of("data linked.yaml").argv == ("data", "linked.yaml")


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


MINE = """
import torch
from made import WIDTH
from trainers import Spec, Workload


class Mine(Workload):
    class Data(Spec):
        sources: list[str] = []

    def dataset(self):
        return {}

    def build(self):
        return torch.nn.Linear(WIDTH, 1)

    def forward(self, model, batch):
        return model(batch["x"])

    def loss(self, output, batch):
        return output[:, 0]
"""


@pytest.fixture
def mine(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a workload, `mine:Mine`, that imports a module of its own."""
    for name in ("mine", "made"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    subprocess.run(["git", "init", "-q"], check=True)
    (own_folder / "mine.py").write_text(MINE)
    (own_folder / "made.py").write_text("WIDTH = 3")
    return own_folder


@pytest.mark.parametrize("name", ["mine", "made"])
def test_a_module_that_is_not_sent_is_refused(name: str, mine: Path) -> None:
    """The workload's own, and one that it imports, which a build has made."""
    refused = rf"^workload: the module {name} is in {name}\.py, which is not sent \(git ignores it"
    (mine / ".gitignore").write_text(f"{name}.py\n")
    with pytest.raises(SpecError, match=refused):
        submission_of("train mine:Mine")
    with pytest.raises(SpecError, match=refused):
        submission_of("data mine:Mine")
    subprocess.run(["git", "add", "-f", f"{name}.py"], check=True)
    assert submission_of("train mine:Mine --name a").name == "a"
    args = build_parser().parse_args(
        ["submit", "--exclude", f"{name}.py", "train", "mine:Mine", "--name", "a"]
    )
    with pytest.raises(SpecError, match=refused):
        args.command(args)


def test_a_module_outside_of_the_folder_is_refused(
    mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by PYTHONPATH, which is this machine's; behind a link in the folder it is sent."""
    (tmp_path / "elsewhere").mkdir()
    (mine / "made.py").rename(tmp_path / "elsewhere/made.py")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "elsewhere"))
    monkeypatch.syspath_prepend(tmp_path / "elsewhere")
    with pytest.raises(SpecError, match=r"the module made is in /.*/elsewhere/made\.py, which is"):
        submission_of("train mine:Mine")
    (mine / "made.py").symlink_to(tmp_path / "elsewhere/made.py")
    assert submission_of("train mine:Mine --name a").name == "a"


def test_data_of_which_a_part_is_not_sent_is_refused(mine: Path) -> None:
    """In lists, too, and where a sweep chooses among them."""
    for name in ("fold0/a.csv", "fold1/a.csv", "fold1/b.npy"):
        (mine / name).parent.mkdir(exist_ok=True)
        (mine / name).touch()
    line = "train mine:Mine --name a --set data.sources"
    assert submission_of(f"{line}=[fold0,fold1]").name == "a"
    (mine / ".gitignore").write_text("*.npy\n")
    with pytest.raises(SpecError, match=r"^data\.sources: fold1/b\.npy is on this machine and is"):
        submission_of(f"{line}=[fold0,fold1]")
    assert submission_of(f"{line}=[fold0,./fold0/a.csv,fold7]").name == "a"
