"""Checks that all machines of a run can see its storage.

Workers read the data set and write checkpoints, each on its own machine. Both may be in a folder
that all machines share (`storage`), or at URIs (`datasets`, `checkpoint.uri`), which pyarrow's
file systems reach from everywhere. A folder that only the driver's machine has is refused: before
training if the machines are in the cluster already, otherwise by the first worker that misses it.
"""

import os
from pathlib import Path
from typing import Any

from cluster.base.errors import SpecError
from trainers.run_folder import SPEC, TRIALS
from trainers.spec import RunSpec

ANSWER_TIMEOUT_S = 60
"""How long to wait for a machine's answer; a machine that does not answer is not refused."""


def needs_shared_folder(spec: RunSpec) -> bool:
    """Whether workers on other machines must see `storage`; always true for trials of a sweep."""
    return spec.sweep is not None or spec.datasets is None or spec.checkpoint.uri is None


def can_see_run(folder: Path) -> bool:
    """Whether this machine sees the folder of a run, or of a trial in its sweep's folder."""
    run_folder = folder.parents[1] if folder.parent.name == TRIALS else folder
    return (run_folder / SPEC).is_file()


def require_run_visible(folder: Path, spec: RunSpec) -> None:
    """Raise SpecError if this machine does not see a run's folder, and must."""
    if needs_shared_folder(spec) and not can_see_run(folder):
        raise _not_visible_error(folder, [_address()], trials=spec.sweep is not None)


def require_sweep_visible(folder: Path) -> None:
    """Raise SpecError if this machine, which trains a trial, does not see its sweep's folder."""
    if not can_see_run(folder):
        raise _not_visible_error(folder, [_address()], trials=True)


def require_visible_everywhere(folder: Path, spec: RunSpec) -> None:
    """Raise SpecError if a machine of the cluster does not see the run's folder, and must.

    Machines without CPUs for workers, such as the head, are not asked.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    own = ray.get_runtime_context().get_node_id()
    others = [
        node
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] != own and node["Resources"].get("CPU")
    ]
    if not needs_shared_folder(spec) or not others:
        return
    # A function of the standard library, so that no machine imports this module and torch.
    is_file = ray.remote(num_cpus=0, max_retries=0)(os.path.isfile)
    asked = {
        is_file.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(str(folder / SPEC)): node["NodeManagerAddress"]
        for node in others
    }
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_TIMEOUT_S)
    blind = [asked[answer] for answer in answered if _answer(answer) is False]
    if blind:
        raise _not_visible_error(folder, blind, trials=spec.sweep is not None)


def _answer(reference: Any) -> bool | None:
    """The answer; None if the machine was lost before it gave one."""
    import ray

    try:
        return bool(ray.get(reference))
    except ray.exceptions.RayError:
        return None


def _address() -> str:
    import ray

    return str(ray.util.get_node_ip_address())


def _not_visible_error(folder: Path, blind: list[str], trials: bool) -> SpecError:
    """The error for machines, by address, that do not see a run's folder."""
    ways = "a folder that all machines share (NFS)"
    if not trials:
        ways += ", or datasets and checkpoint.uri at URIs such as s3://bucket/path"
    return SpecError(
        f"storage: {folder} cannot be seen from {', '.join(sorted(blind))}, where workers are to "
        f"run; it takes {ways}"
    )
