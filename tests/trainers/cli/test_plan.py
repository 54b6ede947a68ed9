"""The verbs `plan` and `scaling`, and the run that follows a plan, on a real Ray and MLflow."""

import json
from pathlib import Path

import pytest

from heliostat.main import main

SMALL = ["--set", "train.epochs=2", "--set", "model.width=4", "--set", "scale.cpus_per_worker=2"]


@pytest.fixture
def folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_cluster: str, mlflow_server: str
) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    monkeypatch.setenv("HELIOSTAT_PRICES", str(tmp_path / "prices.yaml"))
    (tmp_path / "prices.yaml").write_text(
        "machines: {ci: {hosts: ['*'], vcpus: 4, memory_gib: 8, bought_usd: 0, life_years: 1, "
        "power_w: 100, usd_per_kwh: 0.3, g_co2e_per_kwh: 200}}\n"
    )
    return tmp_path


@pytest.mark.slow
def test_a_plan_the_planned_run_and_a_scaling_study(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    on = ["--on", "provider=aws name=p4d.24xlarge"]
    assert main(["plan", "digits", *SMALL, "--seconds", "0.3", *on]) == 0
    output = capfd.readouterr().out
    for said in ("measured", "data sheet", "fastest", "cheapest", "greenest", "knee", "2026-07-20"):
        assert said in output, output
    lines = [json.loads(line) for line in (folder / "runs/forecasts.jsonl").open()]
    assert [line["kind"] for line in lines] == ["forecast"] * 2  # one and two workers
    (recorded,) = folder.glob("runs/plan-digits-*/probes.json")
    assert {each["batch"] for each in json.loads(recorded.read_text())} == {32, 64}

    two = ["--set", "scale.workers=2", "--name", "two"]
    assert main(["train", "digits", *SMALL, *two]) == 0
    output = capfd.readouterr().out
    assert "forecast (measured)" in output
    actual = json.loads((folder / "runs/forecasts.jsonl").read_text().splitlines()[-1])
    assert (actual["kind"], actual["run"]) == ("actual", "two")
    assert actual["wall_s"] > 0

    study = ["--workers", "1,2", "--seconds", "0.3", "--name", "study"]
    assert main(["scaling", "digits", *SMALL, *study]) == 0
    output = capfd.readouterr().out
    assert "recommended for batch 64" in output
    assert (folder / "runs/study/scaling.png").read_bytes().startswith(b"\x89PNG")
    found = runs()
    assert found["two"].data.metrics["forecast/actual_s"] == pytest.approx(actual["wall_s"])
    assert "forecast" in found["two"].data.tags["heliostat.forecast"]
    assert found["study"].data.tags["heliostat.kind"] == "scaling"
    for mode in ("strong", "weak"):
        series = history(found["study"].info.run_id, f"scaling/{mode}/samples_per_s")
        assert sorted(series) == [1, 2]
    assert history(found["study"].info.run_id, "scaling/strong/efficiency")[1] == 1


def runs() -> dict[str, object]:
    import mlflow

    found = mlflow.MlflowClient().search_runs(experiments(), max_results=100)
    return {run.info.run_name: run for run in found}


def experiments() -> list[str]:
    import mlflow

    return [each.experiment_id for each in mlflow.MlflowClient().search_experiments()]


def history(run: str, name: str) -> dict[int, float]:
    import mlflow

    return {each.step: each.value for each in mlflow.MlflowClient().get_metric_history(run, name)}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", "digits", "--on", "provider=awz"], "provider: aws, azure"),
        (["plan", "digits", "--seconds", "0"], "--seconds: must be greater than 0"),
        (["plan", "nowhere"], "no spec 'nowhere'"),
        (["scaling", "digits", "--workers", "1,3"], "cannot be shared evenly by 3"),
        (["scaling", "digits", "--workers", "1,64"], "the cluster has room for 4 on cpu"),
    ],
)
def test_mistakes_are_errors_of_one_line(
    arguments: list[str], said: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert said in capfd.readouterr().err
