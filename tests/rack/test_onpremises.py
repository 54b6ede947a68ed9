"""Training and sweeps on premises while machines are lost: the results stay the same."""

import hashlib
import json
from pathlib import Path

import pytest
from own_hosts import Notes, OwnHosts
from rack import SHARED

pytestmark = pytest.mark.cluster

SUBMIT = "heliostat submit --cluster cluster.yaml"
FOLLOW = "heliostat logs --follow --cluster cluster.yaml"
LIMIT_S = 900


@pytest.fixture(scope="module")
def cluster(own_hosts: OwnHosts) -> OwnHosts:
    own_hosts.me("heliostat up cluster.yaml", timeout_s=600)
    return own_hosts


def submitted(cluster: OwnHosts, name: str, *options: str) -> Notes:
    """Start a slow run on two workers; returns its notes."""
    notes = f"--set data.notes={SHARED}/notes/{name}"
    words = [SUBMIT, *options, "train slow.yaml --name", name, notes]
    cluster.me(" ".join(words), timeout_s=LIMIT_S)
    return Notes(cluster.shared, name)


def start_and_save(cluster: OwnHosts, name: str) -> Notes:
    """Start a run and wait until both hosts have trained and a checkpoint is saved."""
    notes = submitted(cluster, name)
    saved = cluster.shared / "runs" / name / "checkpoints"
    cluster.wait(lambda: len(list(saved.glob("step-*"))) >= 1, f"a checkpoint of {name}", LIMIT_S)
    assert {host for _, host in notes.steps()} == {"one", "two"}
    return notes


def end(cluster: OwnHosts, name: str) -> str:
    """Wait until a job has succeeded; returns its log."""
    return cluster.me(f"{FOLLOW} {name}", timeout_s=LIMIT_S)


def weights(cluster: OwnHosts, name: str) -> str:
    model = cluster.shared / "runs" / name / "model/model.safetensors"
    return hashlib.sha256(model.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def undisturbed(cluster: OwnHosts) -> str:
    """The weights of an undisturbed run on both hosts, followed to its end."""
    Notes(cluster.shared, "quiet").go_on()
    notes = submitted(cluster, "quiet", "--follow")
    assert {host for _, host in notes.steps()} == {"one", "two"}
    return weights(cluster, "quiet")


def test_a_worker_is_replaced_by_an_empty_machine_during_training(
    cluster: OwnHosts, undisturbed: str
) -> None:
    notes = start_and_save(cluster, "pulled")
    cluster.pull("two")
    cluster.wait_for_nodes(2)
    cluster.boot("two")
    notes.go_on()
    end(cluster, "pulled")
    assert weights(cluster, "pulled") == undisturbed


def test_a_worker_loses_its_network_for_a_while(cluster: OwnHosts, undisturbed: str) -> None:
    """Until the cluster has noticed, which takes about 10 s."""
    cluster.wait_for_nodes(3)
    notes = start_and_save(cluster, "cut")
    cluster.cut("two")
    cluster.wait_for_nodes(2)
    cluster.heal("two")
    notes.go_on()
    end(cluster, "cut")
    assert weights(cluster, "cut") == undisturbed


def tracked(cluster: OwnHosts, sweep: str) -> dict[str, str]:
    """Name -> status in MLflow of a sweep's run and of its trials' runs."""
    code = f"""
import json, mlflow
client = mlflow.MlflowClient('http://10.77.0.10:5000')
ids = [experiment.experiment_id for experiment in client.search_experiments()]
runs = client.search_runs(ids, max_results=1000)
sweep = next(run for run in runs if run.info.run_name == '{sweep}').info.run_id
own = [run for run in runs if sweep in (run.info.run_id, run.data.tags.get('mlflow.parentRunId'))]
print('found', json.dumps([[run.info.run_name, run.info.status] for run in own]))
"""
    output = cluster.run("head", f'MLFLOW_TRACKING_URI=http://10.77.0.10:5000 python -c "{code}"')
    line = next(line for line in output.stdout.splitlines() if line.startswith("found "))
    found = json.loads(line.removeprefix("found "))
    assert len(dict(found)) == len(found), "a trial has two runs"
    return dict(found)


def test_a_sweep_survives_the_loss_of_the_head(cluster: OwnHosts) -> None:
    """An empty machine replaces the head; no trial is lost or run twice."""
    cluster.wait_for_nodes(3)
    few = "--set sweep.trials=4 --set sweep.fuse=off --set train.epochs=20"
    few += f" --set storage={SHARED}/runs"
    cluster.me(f"{SUBMIT} sweep digits --name many {few}", timeout_s=LIMIT_S)
    folder = cluster.shared / "runs/many"
    cluster.wait(lambda: len(ended(folder)) >= 1, "the first trial", LIMIT_S)
    assert len(ended(folder)) < 4
    cluster.pull("head")
    cluster.boot("head")
    cluster.me("heliostat up cluster.yaml", timeout_s=LIMIT_S)
    end(cluster, "many")
    assert len(ended(folder)) == 4
    runs = tracked(cluster, "many")
    names = ["many", *(f"many-{number:04d}" for number in range(4))]
    assert runs == dict.fromkeys(names, "FINISHED")


def ended(sweep: Path) -> list[Path]:
    return [path for path in sweep.glob("trials/*") if (path / "ended.json").exists()]
