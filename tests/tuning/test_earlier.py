"""What a new sweep takes from earlier ones, read from folders as sweeps and runs leave them."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from cluster.base.config import write_yaml
from cluster.base.errors import SpecError
from trainers.run_folder import SPEC, TRIALS
from trainers.spec import resolve
from tuning import earlier
from tuning.search.optuna_study import SearchStudy
from tuning.spaces.space import SweepRunSpec, SweepSpec
from tuning.trials.journal import Journal
from tuning.trials.trial import ENDED_FILE, JOURNAL_FILE, LAST_RESULT_FILE, Sweep

PARAMETERS = {
    "optimizer.lr": {"uniform": [0.1, 1.0]},
    "model.width": {"choice": [8, 16]},
}


def spec_data(**sweep: Any) -> dict[str, Any]:
    return {
        "workload": "vision",
        "optimizer": {"lr": 0.5, "weight_decay": 0.25},
        "model": {"width": 8, "blocks": [1]},
        "sweep": {"parameters": PARAMETERS, "trials": 8, **sweep},
    }


def write_sweep(folder: Path, trials: list[tuple[float, int, float | None]], **fields: Any) -> Path:
    """A sweep whose trials ended with these learning rates, widths and losses."""
    folder.mkdir()
    data = spec_data(**fields)
    spec, _ = resolve(data, SweepRunSpec)
    write_yaml(spec.model_dump(mode="json"), folder / SPEC)
    journal = Journal(folder / JOURNAL_FILE)
    for number, (lr, width, loss) in enumerate(trials):
        journal.record_suggestion(number, {"optimizer.lr": lr, "model.width": width})
        journal.record_end(number, loss, 10, True)
        trial = folder / TRIALS / f"{number:04d}"
        trial.mkdir(parents=True)
        last = {"val/loss": loss, "val/latency_ms": 20.0 * lr, "step": 10, "epoch": 1.0}
        last |= {"complete": True, "device_s": 1.0}
        if loss is not None:
            (trial / LAST_RESULT_FILE).write_text(json.dumps(last))
            (trial / ENDED_FILE).write_text("{}")
    return folder


def test_like_a_sweep_are_its_best_trials_the_best_one_first(tmp_path: Path) -> None:
    write_sweep(
        tmp_path / "old",
        [(0.2, 8, 0.5), (0.3, 8, math.nan), (0.4, 16, 0.1), (0.6, 8, 0.4), (0.7, 8, 0.9)],
    )
    sweep, _ = resolve(spec_data(), SweepRunSpec)
    points = earlier.points_like(sweep.sweep, "old", tmp_path)
    assert points == [
        {"optimizer.lr": 0.4, "model.width": 16},
        {"optimizer.lr": 0.6, "model.width": 8},
        {"optimizer.lr": 0.2, "model.width": 8},
    ]


def test_like_a_run_are_its_values_as_far_as_they_are_in_the_space(tmp_path: Path) -> None:
    """Also those that the sweep gives in another form: a section, several fields, a tie."""
    folder = tmp_path / "run"
    folder.mkdir()
    data = {**spec_data(), "sweep": None}
    write_yaml(data, folder / SPEC)
    parameters = {
        "optimizer.lr": {"uniform": [0.1, 0.4]},  # 0.5 is outside
        "optimizer.weight_decay": {"loguniform": [0.01, 1]},
        "model": {"choice": [{"width": 4, "blocks": [1, 1]}, {"width": 8, "blocks": [1]}]},
        "recipe": {
            "choice": [
                {"optimizer.lr": 0.1, "optimizer.weight_decay": 0.0},
                {"optimizer.lr": 0.5, "optimizer.weight_decay": 0.25},
            ]
        },
        "optimizer.schedule.warmup": {"same_as": "optimizer.lr"},
    }
    sweep = SweepSpec.model_validate({"parameters": parameters})
    assert earlier.points_like(sweep, str(folder), tmp_path / "elsewhere") == [
        {
            "optimizer.weight_decay": 0.25,
            "model": {"width": 8, "blocks": [1]},
            "recipe": {"optimizer.lr": 0.5, "optimizer.weight_decay": 0.25},
        }
    ]
    outside = SweepSpec.model_validate({"parameters": {"optimizer.lr": {"uniform": [2, 3]}}})
    with pytest.raises(SpecError, match="--like run: has no values that are within"):
        earlier.points_like(outside, "run", tmp_path)
    with pytest.raises(SpecError, match="--like nothing: no such run or sweep in"):
        earlier.points_like(sweep, "nothing", tmp_path)


def test_a_warm_start_is_journaled_once_and_the_search_learns_from_it(tmp_path: Path) -> None:
    old = write_sweep(
        tmp_path / "old",
        [*[(0.1 + 0.05 * n, 16, abs(0.05 * n - 0.2)) for n in range(16)], (0.2, 8, None)],
    )
    data = {**spec_data(warm_start=["old"]), "storage": str(tmp_path)}
    spec, _ = resolve(data, SweepRunSpec)
    found = earlier.find_earlier_trials(data, spec.sweep)
    assert list(found) == [str(old)]
    assert [trial["value"] for trial in found[str(old)]][:2] == [0.2, abs(0.05 - 0.2)]
    assert found[str(old)][0]["parameters"] == {"optimizer.lr": 0.1, "model.width": 16}

    new = Sweep(data, spec.sweep, tmp_path, tmp_path / "new")
    new.folder.mkdir()
    earlier.record_earlier_trials(new, found)
    earlier.record_earlier_trials(new, found)
    assert (new.folder / JOURNAL_FILE).read_text().count("\n") == 1
    journal = Journal(new.folder / JOURNAL_FILE)
    search = SearchStudy(spec.sweep, journal)
    assert len(search.trials) == 16
    near = 0
    for number in range(8):
        suggested = search.suggest(number)
        assert suggested is not None
        journal.record_suggestion(number, *suggested)
        loss = abs(suggested[0]["optimizer.lr"] - 0.3)
        near += loss < 0.1
        journal.record_end(number, loss, 10, True)
        search.tell(number)
        again = SearchStudy(spec.sweep, Journal(new.folder / JOURNAL_FILE))
        assert again.suggest(number + 1) == search.suggest(number + 1)
        search = SearchStudy(spec.sweep, journal)
    assert near >= 4, "the earlier trials point at a fifth of the range"
    earlier.record_earlier_trials(new, {"late": []})
    assert list(Journal(new.folder / JOURNAL_FILE).earlier) == [str(old)]


def test_cmaes_begins_at_the_best_earlier_trials(tmp_path: Path) -> None:
    parameters = {
        "optimizer.lr": {"uniform": [0.1, 1.0]},
        "optimizer.weight_decay": {"uniform": [0, 1]},
    }
    trials = [
        {
            "parameters": {"optimizer.lr": 0.85 + 0.001 * n, "optimizer.weight_decay": 0.25},
            "value": n / 100,
            "step": 1,
            "complete": True,
        }
        for n in range(20)
    ]
    journal = Journal(tmp_path / "journal")
    journal.record_earlier("old", trials)
    spec = SweepSpec.model_validate({"parameters": parameters, "search": "cmaes", "trials": 12})
    search, rates = SearchStudy(spec, journal), []
    for number in range(12):
        suggested = search.suggest(number)
        assert suggested is not None
        journal.record_suggestion(number, *suggested)
        journal.record_end(number, 1.0, 1, True)
        search.tell(number)
        rates.append(suggested[0]["optimizer.lr"])
    assert sorted(rates)[3] > 0.7


def test_constraints_are_looked_at_in_earlier_trials(tmp_path: Path) -> None:
    old = write_sweep(tmp_path / "old", [(0.2, 8, 0.5), (0.9, 8, 0.4)])
    data = spec_data(warm_start=[str(old)], constraints=["val/latency_ms <= 10"])
    spec, _ = resolve({**data, "storage": str(tmp_path)}, SweepRunSpec)
    (trials,) = earlier.find_earlier_trials({**data, "storage": str(tmp_path)}, spec.sweep).values()
    assert [trial["violations"] for trial in trials] == [
        {"val/latency_ms <= 10": -6.0},
        {"val/latency_ms <= 10": 8.0},
    ]


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ({"mode": "max"}, {}, "compares its trials by val/loss max, this sweep by val/loss min"),
        ({"scheduler": {"name": "pbt"}}, {}, "pbt changed the parameters of its trials"),
        (
            {},
            {"parameters": {"optimizer.lr": {"uniform": [2, 3]}}},
            "none of its trials is within sweep.parameters",
        ),
    ],
)
def test_a_sweep_that_cannot_be_learned_from_is_refused(
    old: dict[str, Any], new: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    write_sweep(tmp_path / "old", [(0.2, 8, 0.5)], **old)
    data = {**spec_data(**new, warm_start=["old"]), "storage": str(tmp_path)}
    spec, _ = resolve(data, SweepRunSpec)
    with pytest.raises(SpecError) as caught:
        earlier.find_earlier_trials(data, spec.sweep)
    assert str(caught.value).startswith("sweep.warm_start: old: ")
    assert problem in str(caught.value)
