"""The fields of a spec, how a spec is found, and how mistakes in it are reported."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.base.config import apply_overrides, validate
from cluster.base.errors import SpecError
from heliostat.main import main
from trainers.spec import SPECS_FOLDER, RunSpec, ScaleSpec, TrainSpec, find_spec, resolve
from trainers.workload import load_workload
from trainers.workloads.vision.workload import Vision

OWN: dict[str, Any] = {"workload": "spirals:Spirals"}


def message_of(data: dict[str, Any]) -> str:
    with pytest.raises(SpecError) as caught:
        resolve(data, RunSpec)
    return str(caught.value)


class TestDefaults:
    def test_only_the_workload_is_required(self) -> None:
        spec = validate(RunSpec, {"workload": "vision"})
        assert spec.optimizer.name == "adamw"
        assert spec.optimizer.lr == 1e-3
        assert spec.optimizer.schedule.name == "cosine"
        assert spec.train.global_batch == 64
        assert spec.train.precision == "fp32"
        assert spec.train.clip_norm is None
        assert (spec.scale.workers, spec.scale.max_workers) == (1, 1)
        assert spec.checkpoint.keep == 2
        assert spec.storage == "runs"
        assert spec.sweep is None

    def test_the_workload_is_required(self) -> None:
        with pytest.raises(SpecError, match=r"^workload: is required$"):
            validate(RunSpec, {})

    def test_resolve_fills_in_the_workloads_own_defaults(self, own_folder: Path) -> None:
        spec, workload = resolve({**OWN, "model": {"width": 8}}, RunSpec)
        assert spec.data == {"points": 400, "noise": 0.05}
        assert spec.model == {"width": 8, "dropout": 0.1}
        assert type(workload).__name__ == "Spirals"
        assert workload.model.width == 8

    def test_a_resolved_spec_resolves_to_itself(self, own_folder: Path) -> None:
        spec, _ = resolve({**OWN, "scale": {"workers": [1, 4]}}, RunSpec)
        again, _ = resolve(spec.model_dump(mode="json"), RunSpec)
        assert again == spec


class TestLength:
    @pytest.mark.parametrize(
        ("train", "samples", "steps"),
        [
            ({}, 640, 100),  # ten epochs
            ({"epochs": 3}, 640, 30),
            ({"epochs": 1}, 641, 11),
            ({"epochs": 0.5, "global_batch": 32}, 640, 10),
            ({"epochs": 0.001}, 640, 1),
            ({"epochs": 3}, 5, 1),
            ({"steps": 7}, 640, 7),
            ({"epochs": 1.1, "global_batch": 1}, 10, 11),  # 1.1 * 10 is a little more than 11
        ],
    )
    def test_total_steps(self, train: dict[str, Any], samples: int, steps: int) -> None:
        assert validate(TrainSpec, train).total_steps(samples) == steps

    @given(
        epochs=st.integers(1, 100), samples=st.integers(1, 10**6), global_batch=st.integers(1, 512)
    )
    def test_steps_for_epochs_is_the_first_step_that_ends_the_epoch(
        self, epochs: int, samples: int, global_batch: int
    ) -> None:
        steps = TrainSpec(global_batch=global_batch).steps_for_epochs(float(epochs), samples)
        assert (steps - 1) * global_batch < epochs * samples <= steps * global_batch

    def test_epochs_and_steps_exclude_each_other(self) -> None:
        message = message_of({"workload": "vision", "train": {"epochs": 1, "steps": 2}})
        assert message.startswith("train: epochs and steps exclude each other; give one")
        assert "\n" not in message


class TestScale:
    @pytest.mark.parametrize("workers", [1, 2, 64, [1, 1], [2, 3], [1, 64]])
    def test_worker_counts_that_divide_a_batch_of_64(self, workers: int | list[int]) -> None:
        spec = validate(RunSpec, {"workload": "vision", "scale": {"workers": workers}})
        assert spec.scale.max_workers == (workers if isinstance(workers, int) else workers[1])

    @pytest.mark.parametrize(
        ("workers", "batch", "says"),
        [
            (3, 64, "train.global_batch 64 cannot be shared evenly by scale.workers 3"),
            (128, 64, "train.global_batch 64 cannot be shared evenly by scale.workers 128"),
            ([1, 9], 8, "train.global_batch 8 is too small for scale.workers 9"),
        ],
    )
    def test_worker_counts_that_do_not_divide_the_batch(
        self, workers: int | list[int], batch: int, says: str
    ) -> None:
        data = {"train": {"global_batch": batch}, "scale": {"workers": workers}}
        assert message_of({"workload": "vision", **data}).startswith(says)

    def test_min_must_not_exceed_max(self) -> None:
        with pytest.raises(SpecError) as caught:
            validate(ScaleSpec, {"workers": [4, 2]}, "scale.")
        assert str(caught.value) == "scale.workers: must be [min, max] with min <= max (got [4, 2])"

    @pytest.mark.parametrize("workers", [0, -1, [0, 2], [4], [1, 2, 3], "many", 1.5])
    def test_other_values_of_workers_are_refused(self, workers: Any) -> None:
        with pytest.raises(SpecError, match=r"^scale\.workers"):
            validate(ScaleSpec, {"workers": workers}, "scale.")

    @pytest.mark.parametrize(
        ("scale", "says"),
        [
            ({"group": 2}, "group: only used with parallel hsdp and tensor, not auto"),
            ({"parallel": "tensor"}, "group: tensor needs the number of workers that split"),
            (
                {"parallel": "tensor", "group": 2, "workers": 3},
                "group: workers must be a multiple of group 2",
            ),
            (
                {"parallel": "tensor", "group": 2, "workers": [2, 4]},
                "group: workers must be a multiple of group 2",
            ),
        ],
    )
    def test_invalid_groups(self, scale: dict[str, Any], says: str) -> None:
        message = message_of({"workload": "vision", "scale": scale})
        assert message.startswith("scale: ")
        assert says in message

    def test_tensor_parallel_workers_process_the_same_samples(self) -> None:
        scale = {"parallel": "tensor", "group": 4, "workers": 8}
        spec = validate(RunSpec, {"workload": "x", "train": {"global_batch": 2}, "scale": scale})
        assert spec.scale.data_parallel_size == 2


class TestFindSpec:
    def test_a_file_is_named_after_its_stem(self, tmp_path: Path) -> None:
        path = tmp_path / "my.run.yaml"
        path.write_text("workload: vision\n")
        assert find_spec(str(path)) == ("my.run", {"workload": "vision"})

    def test_any_existing_file_is_read(self, tmp_path: Path) -> None:
        path = tmp_path / "spec.txt"
        path.write_text("workload: vision\n")
        assert find_spec(str(path)) == ("spec", {"workload": "vision"})

    def test_a_class_is_a_spec_of_defaults(self) -> None:
        assert find_spec("spirals:Spirals") == ("spirals", OWN)

    @pytest.mark.parametrize(
        "path", sorted(SPECS_FOLDER.glob("*.yaml")), ids=lambda path: path.stem
    )
    def test_every_shipped_spec_resolves(self, path: Path) -> None:
        name, data = find_spec(path.stem)
        spec, workload = resolve(data, RunSpec)
        assert name == path.stem
        assert isinstance(workload, load_workload(spec.workload))

    def test_digits_is_shipped(self) -> None:
        name, data = find_spec("digits")
        assert (name, data["workload"]) == ("digits", "vision")

    @pytest.mark.parametrize(
        ("name", "ending"),
        [("digit", "; did you mean 'digits'?"), ("qqq", "(known: "), ("runs/x", "(known: ")],
    )
    def test_an_unknown_name(self, name: str, ending: str) -> None:
        with pytest.raises(SpecError) as caught:
            find_spec(name)
        message = str(caught.value)
        start = f"no spec {name!r}: neither a file, nor module:Class, nor a shipped spec"
        assert message.startswith(start)
        assert ending in message.removeprefix(start)


class TestMistakes:
    def test_mistakes_of_all_sections_are_reported_together(self, own_folder: Path) -> None:
        data = {
            **OWN,
            "data": {"points": "x"},
            "model": {"widht": 3},
            "optimizer": {"lr": -1},
            "traim": {},
        }
        assert set(message_of(data).splitlines()) == {
            "traim: unknown key; did you mean 'train'?",
            "optimizer.lr: must be greater than 0 (got -1)",
            "data.points: must be a valid integer, unable to parse string as an integer (got 'x')",
            "model.widht: unknown key; did you mean 'width'?",
        }

    def test_each_mistake_is_reported_once(self, own_folder: Path) -> None:
        message = message_of({**OWN, "model": 3, "train": {"steps": 0}})
        assert sorted(message.splitlines()) == [
            "model: must be a mapping (got 3)",
            "train.steps: must be greater than 0 (got 0)",
        ]

    @pytest.mark.parametrize("data", [{}, {"workload": None}, {"workload": 3}])
    def test_no_workload(self, data: dict[str, Any]) -> None:
        assert message_of(data) == f"workload: must name a workload (got {data.get('workload')!r})"


class TestLoadWorkload:
    def test_shipped_by_name_and_own_by_class(self, own_folder: Path) -> None:
        assert load_workload("vision") is Vision
        assert load_workload("spirals:Spirals") is sys.modules["spirals"].Spirals

    @pytest.mark.parametrize(
        ("source", "name", "message"),
        [
            (None, "visoin", "no workload 'visoin'; did you mean 'vision'?"),
            (None, "absent:X", "no module 'absent' in {folder}"),
            (None, "spirals.deeper:X", "no module 'spirals.deeper' in {folder}"),
            (None, "spirals:Spiral", "spirals has no class 'Spiral'; did you mean 'Spirals'?"),
            (None, "spirals:Circle", "spirals has no class 'Circle' (known: Spirals)"),
            ("class Own: ...", "own:Own", "own:Own is not a subclass of trainers.Workload"),
            ("Own = 3", "own:Own", "own:Own is not a subclass of trainers.Workload"),
            (
                "from trainers import Workload\nclass Own(Workload):\n    def build(self): ...",
                "own:Own",
                "own:Own does not define dataset, forward, loss",
            ),
            ("import numpi", "own:Own", "own cannot be imported: No module named 'numpi'"),
            (
                "x = 1\ny = undefined",
                "own:Own",
                "own cannot be imported: NameError: name 'undefined' is not defined "
                "({folder}/own.py:2)",
            ),
        ],
    )
    def test_an_unusable_workload_is_reported_in_one_line(
        self, own_folder: Path, source: str | None, name: str, message: str
    ) -> None:
        if source is not None:
            (own_folder / "own.py").write_text(source)
            importlib.invalidate_caches()
        with pytest.raises(SpecError) as caught:
            load_workload(name)
        assert str(caught.value) == "workload: " + message.format(folder=own_folder)

    @pytest.mark.parametrize(
        ("source", "line", "reason"),
        [
            ("x = 1\ndef f(:\n", 2, "SyntaxError"),
            ("x = 1\n  y = 2\n", 2, "IndentationError"),
            ("\n\n\nimport json\njson.loads('{')\n", 5, "JSONDecodeError"),
            ("import torch\ntorch.zeros(2) @ torch.zeros(3)\n", 2, "RuntimeError"),
        ],
    )
    def test_the_location_is_in_the_users_file(
        self, own_folder: Path, source: str, line: int, reason: str
    ) -> None:
        """Even if a library or the compiler raises the error."""
        (own_folder / "own.py").write_text(source)
        importlib.invalidate_caches()
        with pytest.raises(SpecError) as caught:
            load_workload("own:Own")
        message = str(caught.value)
        assert message.startswith(f"workload: own cannot be imported: {reason}: ")
        assert f"{own_folder}/own.py:{line}" in message
        assert "frozen" not in message
        assert "\n" not in message


HEADER = "workload: spirals:Spirals\n"
BAD_SPECS = {
    "unknown key": ("optimizer: {lrr: 1}", [], "optimizer.lrr: unknown key; did you mean 'lr'?"),
    "unknown section": ("modell: {}", [], "modell: unknown key; did you mean 'model'?"),
    "unknown own key": ("model: {widht: 3}", [], "model.widht: unknown key; did you mean 'width'?"),
    "wrong type": ("train: {precision: 16}", [], "train.precision: must be 'fp32', 'bf16', "),
    "not a section": ("train: 3", [], "train: must be a mapping (got 3)"),
    "impossible value": ("train: {steps: 0}", [], "train.steps: must be greater than 0 (got 0)"),
    "list too short": ("optimizer: {betas: [0.9]}", [], "optimizer.betas"),
    "contradiction": ("train: {epochs: 1, steps: 1}", [], "train: epochs and steps exclude"),
    "indivisible": ("scale: {workers: 7}", [], "train.global_batch 64 cannot be shared evenly"),
    "broken YAML": ("train: {steps: 1", [], "a.yaml:3:1: broken YAML: "),
    "no date": ("storage: 2026-13-01", [], "a.yaml"),
    "no folder": ("storage: spirals.py", [], "storage: "),
    "--set without =": ("", ["--set", "train.steps"], "--set train.steps: must look like "),
    "--set unknown": ("", ["--set", "train.stesp=3"], "train.stesp: unknown key; did you mean "),
    "--set below a leaf": ("storage: x", ["--set", "storage.x=3"], "storage: has no key 'x'"),
    "--from nothing": ("", ["--from", "absent"], "--from absent: no checkpoint there"),
    "a change of what the data depend on": (
        "changes: [{step: 3, set: {train.global_batch: 2}}]",
        [],
        "changes.0.set: train.global_batch cannot change while a run goes on; optimizer, model",
    ),
    "a change to no value": (
        "changes: [{step: 3, set: {optimizer.lr: 1}}, {step: 4, set: {optimizer.lr: -1}}]",
        [],
        "changes.1.set: optimizer.lr: must be greater than 0 (got -1)",
    ),
    "a change of what is not there": (
        "changes: [{step: 3, set: {model.widht: 2}}]",
        [],
        "changes.0.set: model.widht: unknown key; did you mean 'width'?",
    ),
    "changes out of order": (
        "changes: [{step: 3, set: {}}, {step: 3, set: {}}]",
        [],
        "changes: must be in the order of their steps, each step once",
    ),
    "no val split": ("data: {points: 1}", [], "the data set of spirals has no samples in its "),
}
BAD_ARGUMENTS = {
    "missing file": (["absent.yaml"], "absent.yaml: No such file or directory"),
    "unknown spec": (
        ["digit"],
        "no spec 'digit': neither a file, nor module:Class, nor a shipped spec; ",
    ),
    "unknown class": (["spirals:Spiral"], "workload: spirals has no class 'Spiral'; did you mean"),
    "unknown module": (["spiral:Spirals"], "workload: no module 'spiral' in "),
    "does not import": (
        ["broken:Own"],
        "workload: broken cannot be imported: NameError: name 'nu' ",
    ),
    "unknown run": (["--resume", "absent"], "--resume absent: no such run in runs"),
    "nothing": ([], "train: needs a spec, or --resume RUN"),
    "name of a folder": (["spirals:Spirals", "--name", "taken"], "--name taken: "),
}


@pytest.mark.parametrize("case", [*BAD_SPECS, *BAD_ARGUMENTS])
def test_a_bad_spec_is_one_line_on_stderr_and_exit_code_2(
    own_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    case: str,
) -> None:
    # No address: a run that came as far as Ray would end with exit code 1.
    monkeypatch.setenv("RAY_ADDRESS", "nowhere")
    (own_folder / "broken.py").write_text("nu\n")
    (own_folder / "runs" / "taken").mkdir(parents=True)
    (own_folder / "runs" / "taken" / "notes.txt").touch()
    importlib.invalidate_caches()
    if case in BAD_SPECS:
        text, options, start = BAD_SPECS[case]
        (own_folder / "a.yaml").write_text(f"{HEADER}{text}\n")
        arguments = ["a.yaml", *options]
    else:
        arguments, start = BAD_ARGUMENTS[case]
    assert main(["train", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(start)
    assert printed.err.count("\n") == 1
    assert len(printed.err) < 300
    assert not list(own_folder.rglob("spec.yaml"))  # no run has begun


def test_overrides_are_checked_like_the_file() -> None:
    data = apply_overrides({"workload": "vision"}, ["model.width=8", "train.steps=1e1"])
    spec, workload = resolve(data, RunSpec)
    assert spec.train.steps == 10
    assert workload.model.width == 8
