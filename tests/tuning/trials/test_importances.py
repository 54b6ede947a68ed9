"""Which parameters mattered."""

import subprocess
import sys
from pathlib import Path

import pytest

from tuning.spaces.space import SweepSpec
from tuning.trials.importances import parameter_importances
from tuning.trials.journal import Journal

SWEEP = SweepSpec.model_validate(
    {"parameters": {"optimizer.lr": {"uniform": [0, 1]}, "train.seed": {"integer": [0, 9]}}}
)


def journal(path: Path, values: list[float]) -> Journal:
    """A sweep whose metric depends on nothing but the learning rate."""
    journal = Journal(path / "journal")
    for number, value in enumerate(values):
        parameters = {"optimizer.lr": number / len(values), "train.seed": 7 * number % 10}
        journal.record_suggestion(number, parameters)
        journal.record_end(number, value, 10, number % 2 == 0)
    return journal


def test_shares_add_up_to_one_and_stopped_trials_count(tmp_path: Path) -> None:
    shares = parameter_importances(SWEEP, journal(tmp_path, [n / 3 for n in range(20)]))
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["optimizer.lr"] > 0.8


def test_there_are_none_with_too_few_trials(tmp_path: Path) -> None:
    assert parameter_importances(SWEEP, journal(tmp_path, [0.1, 0.2, 0.3])) == {}


def test_there_are_none_where_the_values_differ_by_rounding_alone(tmp_path: Path) -> None:
    """As of four trials that converged; Optuna refuses them."""
    values = [0.019016825492896555, 0.01901682387860409, 0.01901682387860409, 0.01901682536872021]
    assert parameter_importances(SWEEP, journal(tmp_path, values)) == {}


def test_packages_are_loaded_before_they_are_needed() -> None:
    script = (
        "import sys, threading\n"
        "from tuning.trials.importances import load_packages\n"
        "assert 'sklearn.ensemble' not in sys.modules\n"
        "load_packages()\n"
        "[t.join() for t in threading.enumerate() if t.name == 'load-importances']\n"
        "assert {'sklearn.ensemble', 'optuna.importance'} <= sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
