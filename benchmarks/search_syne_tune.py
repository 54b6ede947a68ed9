"""Syne Tune as a contender of benchmarks/search.py, in the Python of an environment of its own.

Its packages need other versions than ours, so it is asked line by line, as JSON on standard input:

| line | answer |
|---|---|
| `{"space": {...}, "epochs": 27, "seed": 0}` | `{}`, and a new search; of 1 epoch, nothing stops |
| `{"ask": 7}` | the parameters of trial 7 |
| `{"trial": 7, "epoch": 3, "loss": 0.5}` | whether to stop the trial |
| `{"ended": 7, "epoch": 27, "loss": 0.4}` | `{}` |

CQR and ASHACQR are what its documentation recommends for one loss and for learning curves.
"""

import datetime
import json
import logging
import sys
from typing import Any

from syne_tune import config_space
from syne_tune.backend.trial_status import Trial
from syne_tune.optimizer.baselines import ASHACQR, CQR

DOMAINS = {
    "uniform": config_space.uniform,
    "loguniform": config_space.loguniform,
    "integer": config_space.randint,
    "log_integer": config_space.lograndint,
}


class Search:
    """One search, and its trials."""

    def __init__(self, space: dict[str, dict[str, Any]], epochs: int, seed: int) -> None:
        domains = {
            name: config_space.choice(values) if kind == "choice" else DOMAINS[kind](*values)
            for name, distribution in space.items()
            for kind, values in distribution.items()
        }
        common = {"metric": "loss", "do_minimize": True, "random_seed": seed}
        self.scheduler = (
            CQR(domains, **common)
            if epochs == 1
            else ASHACQR(domains, time_attr="epoch", max_t=epochs, **common)
        )
        self.trials: dict[int, Trial] = {}

    def ask(self, number: int) -> dict[str, Any]:
        suggestion = self.scheduler.suggest()
        trial = Trial(number, suggestion.config, datetime.datetime.now())
        self.trials[number] = trial
        self.scheduler.on_trial_add(trial)
        return dict(suggestion.config)

    def report(self, number: int, epoch: int, loss: float) -> bool:
        result = {"epoch": epoch, "loss": loss}
        return self.scheduler.on_trial_result(self.trials[number], result) == "STOP"

    def end(self, number: int, epoch: int, loss: float) -> None:
        result = {"epoch": epoch, "loss": loss}
        self.scheduler.on_trial_complete(self.trials[number], result)


def main() -> None:
    logging.disable(logging.WARNING)
    answers, sys.stdout = sys.stdout, sys.stderr
    search: Search | None = None
    for line in sys.stdin:
        request = json.loads(line)
        answer: Any = {}
        if "space" in request:
            search = Search(**request)
        else:
            assert search is not None
            if "ask" in request:
                answer = search.ask(request["ask"])
            elif "trial" in request:
                answer = search.report(request["trial"], request["epoch"], request["loss"])
            else:
                search.end(request["ended"], request["epoch"], request["loss"])
        print(json.dumps(answer, default=lambda value: value.item()), file=answers, flush=True)


if __name__ == "__main__":
    main()
