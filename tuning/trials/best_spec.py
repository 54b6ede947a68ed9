"""The best trial of a sweep as a spec file that `heliostat train` takes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.base.config import flatten, write_yaml
from trainers.spec import RunSpec, ScaleSpec, resolve
from tuning.trials.journal import Journal
from tuning.trials.leaderboard import TrialResult
from tuning.trials.trial import JOURNAL_FILE, Sweep


def write_best(sweep: Sweep, best: TrialResult, path: Path, fused: bool = False) -> None:
    """Write the best trial's spec, with a comment on how exactly it gives the trial's value.

    `fused` says that the trial was trained in a slot.
    """
    schedule = Journal(sweep.folder / JOURNAL_FILE).schedule(best.number, best.changes)
    known = schedule is not None
    parts = schedule or [(0, best.parameters)]
    write_yaml(best_spec_data(sweep, parts), path, comment=_comment(sweep, best, fused, known))


def best_spec_data(sweep: Sweep, parts: list[tuple[int, Mapping[str, Any]]]) -> dict[str, Any]:
    """The spec of a training with the parameters of each part, from its first step on.

    What depends on the sweep in the last digits is in it: the threads, and the device.
    """
    stages = [sweep.trial_spec_data(parameters) for _, parameters in parts]
    data = stages[0]
    scale = ScaleSpec.model_validate(data["scale"])
    own: dict[str, Any] = {"threads": sweep.threads}
    if scale.accelerator == "auto" and scale.max_workers == 1 and not sweep.spec.resources.gpu:
        own["accelerator"] = "cpu"
    data = {**data, "scale": {**data["scale"], **own}}
    if sweep.spec.select == "best":  # the state that counts, which need not be the last one
        ranking = {"metric": sweep.spec.metric, "mode": sweep.spec.mode}
        kept = max(1, data["checkpoint"].get("keep_best", 0))
        data["checkpoint"] = {**data["checkpoint"], "keep_best": kept, **ranking}
    whole = [flatten(resolve(stage, RunSpec)[0].model_dump(mode="json")) for stage in stages]
    changes = []
    for before, after, (step, _) in zip(whole, whole[1:], parts[1:], strict=False):
        news = {path: value for path, value in after.items() if before[path] != value}
        if news:
            changes.append({"step": step, "set": news})
    return {**data, "changes": changes} if changes else data


UNKNOWN = """An earlier release of pbt has changed its parameters, and not kept when. These are the
last ones; training them afresh gives another value."""
FUSED = """Trained alone, as by this file, the value differs by rounding: the trial was one of
several in a program, which adds up in another order. --verify-fusion measures by how much."""
ON_GPU = """On the same machine this file gives that value, to the last digit where the kernels of
its device add up in a fixed order."""
EXACT = "On the same machine this file gives that very value, at that step."


def _comment(sweep: Sweep, best: TrialResult, fused: bool, known: bool) -> str:
    """What the file gives, and how exactly."""
    value = f"{sweep.spec.metric} {best.value!r} at step {best.step}"
    accelerator = ScaleSpec.model_validate(sweep.spec_data["scale"]).accelerator
    on_gpu = bool(sweep.spec.resources.gpu) or accelerator not in ("auto", "cpu")
    exactly = FUSED if fused else ON_GPU if on_gpu else EXACT
    return f"Trial {best.number:04d} of {sweep.key}: {value}.\n{exactly if known else UNKNOWN}"
