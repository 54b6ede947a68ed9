"""Folders of runs that a machine must see."""

from pathlib import Path

import pytest

from cluster.base.errors import SpecError
from trainers.runs.visibility import needs_shared_folder, require_run_visible
from trainers.spec import RunSpec, resolve


def spec_of(folder: Path, **fields: object) -> RunSpec:
    data = {"workload": "spirals:Spirals", "storage": str(folder), **fields}
    return resolve(data, RunSpec)[0]


def test_a_worker_refuses_a_folder_that_its_machine_does_not_see(
    own_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "runs" / "a"
    alone = spec_of(tmp_path / "runs")
    with pytest.raises(SpecError, match=rf"^storage: {folder} cannot be seen from \d.*NFS"):
        require_run_visible(folder, alone)
    folder.mkdir(parents=True)
    (folder / "spec.yaml").touch()
    require_run_visible(folder, alone)


def test_a_shared_folder_is_needed_unless_data_and_checkpoints_are_at_uris(
    own_folder: Path, tmp_path: Path
) -> None:
    at_uris = {"datasets": "s3://b/d", "checkpoint": {"uri": "s3://b/c"}}
    assert not needs_shared_folder(spec_of(tmp_path, **at_uris))
    require_run_visible(tmp_path / "nowhere", spec_of(tmp_path, **at_uris))
    assert needs_shared_folder(spec_of(tmp_path, datasets="s3://b/d"))
    assert needs_shared_folder(spec_of(tmp_path, checkpoint={"uri": "s3://b/c"}))
    assert needs_shared_folder(spec_of(tmp_path, **at_uris, sweep={}))
