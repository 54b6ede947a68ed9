"""What is private to Ray is still there as it was read, one test for each item.

A failure says what has changed and what to do; most items are also used by tests that start a Ray.
"""

import importlib
import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster.connection import ray_internals

RAY_CONSTANTS = "ray._private.ray_constants"
TRAIN_CONSTANTS = "ray.train.v2._internal.constants"


def private(module: str, name: str = "", item: str = "") -> Any:
    """A module of Ray's, or a name in it; fails where this release has none."""
    where = f"{module}.{name}" if name else module
    try:
        found = importlib.import_module(module)
        for part in name.split(".") if name else ():
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        return pytest.fail(changed(item, f"there is no {where} ({error})"))
    return found


def changed(item: str, what: str) -> str:
    """The message of a failed test."""
    release = ray_internals.READ_IN_RELEASE
    return (
        f"ray_internals.{item}: was read in Ray {release}; in Ray {ray.__version__} {what}. "
        f"Read the new release, look for a public way first, and adapt {item} alone."
    )


def expect(condition: object, item: str, what: str) -> None:
    if not condition:
        pytest.fail(changed(item, what))


def expect_in_source(module: str, text: str, item: str) -> None:
    """The source of a module of Ray's contains a text. The module is not imported."""
    try:
        found = importlib.util.find_spec(module)
    except ImportError:
        found = None
    if found is None or found.origin is None:
        pytest.fail(changed(item, f"there is no {module}"))
    source = Path(found.origin).read_text()
    expect(text in source, item, f"{module} does not contain {text!r}")


def fields(message: Any) -> set[str]:
    """The fields of a protobuf message."""
    return set(message.DESCRIPTOR.fields_by_name)


def test_a_change_is_told_with_what_to_do() -> None:
    with pytest.raises(pytest.fail.Exception, match=r"drain_node: was read in .* adapt drain_node"):
        private("ray._raylet", "NoSuchClient", item="drain_node")


def test_importing_it_imports_no_ray() -> None:
    tree = inspect.getsource(ray_internals)
    top_level = [line for line in tree.splitlines() if line.startswith(("import ", "from "))]
    assert not [line for line in top_level if "ray" in line or "cluster" in line]


def test_drain_node() -> None:
    item = "drain_node"
    private("ray._raylet", "GcsClient", item)  # hands all calls on to the inner client
    drain = private("ray._raylet", "InnerGcsClient.drain_node", item)
    parameters = list(inspect.signature(drain).parameters)
    expected = ["self", "node_id", "reason", "reason_message", "deadline_timestamp_ms"]
    expect(parameters[:5] == expected, item, f"InnerGcsClient.drain_node takes {parameters}")
    reasons = private("ray.core.generated.autoscaler_pb2", "DrainNodeReason", item)
    wanted = "DRAIN_NODE_REASON_PREEMPTION"
    expect(wanted in reasons.keys(), item, f"DrainNodeReason has no {wanted}")  # noqa: SIM118


def test_current_cluster_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also where RAY_TMPDIR or TMPDIR moves Ray's folder."""
    item = "current_cluster_file"
    private("ray._common.utils", "get_ray_address_file", item)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    found = ray_internals.current_cluster_file()
    expect(found == tmp_path / "ray" / "ray_current_cluster", item, f"the file is {found}")
    expect_in_source("ray._private.utils", "get_ray_address_file(temp_dir)", item)


def test_autoscaler_status() -> None:
    item = "autoscaler_status"
    status = private("ray.autoscaler.v2.sdk", "get_cluster_status", item)
    expect(
        next(iter(inspect.signature(status).parameters)) == "gcs_address",
        item,
        "get_cluster_status does not take gcs_address first",
    )
    schema = "ray.autoscaler.v2.schema"
    for name, wanted in {
        "ClusterStatus": {
            "active_nodes",
            "idle_nodes",
            "pending_nodes",
            "failed_launches",
            "pending_launches",
        },
        "NodeInfo": {"instance_id", "ray_node_type_name"},
        "LaunchRequest": {"ray_node_type_name", "request_ts_s", "failed_ts_s", "details"},
    }.items():
        missing = wanted - set(private(schema, name, item).__dataclass_fields__)
        expect(not missing, item, f"{name} has no {sorted(missing)}")


def test_free_resources_by_node() -> None:
    item = "free_resources_by_node"
    free = private("ray._private.state", "available_resources_per_node", item)
    expect(not inspect.signature(free).parameters, item, "it takes arguments")


def test_accessor() -> None:
    item = "_accessor"
    private("ray._private.state", "state._connect_and_get_accessor", item)
    for name in ("get_placement_group_table", "get_job_table"):
        private("ray._raylet", f"GlobalStateAccessor.{name}", item)


def test_placement_groups() -> None:
    item = "placement_groups"
    group = private("ray.core.generated.gcs_pb2", "PlacementGroupTableData", item)
    missing = {"placement_group_id", "creator_job_id", "state", "bundles"} - fields(group)
    expect(not missing, item, f"PlacementGroupTableData has no {sorted(missing)}")
    states = set(group.PlacementGroupState.keys())
    expected = {"PENDING", "PREPARED", "CREATED", "REMOVED", "RESCHEDULING"}
    expect(states == expected, item, f"the states are {sorted(states)}")
    bundle = group.DESCRIPTOR.fields_by_name["bundles"].message_type.fields_by_name
    missing = {"node_id", "unit_resources"} - set(bundle)
    expect(not missing, item, f"Bundle has no {sorted(missing)}")


def test_job_metadata() -> None:
    item = "job_metadata"
    job = private("ray.core.generated.gcs_pb2", "JobTableData", item)
    missing = {"job_id", "config"} - fields(job)
    expect(not missing, item, f"JobTableData has no {sorted(missing)}")
    config = job.DESCRIPTOR.fields_by_name["config"].message_type.fields_by_name
    expect("metadata" in config, item, "JobConfig has no metadata")


def test_launcher_state_file() -> None:
    item = "launcher_state_file"
    path = private("ray.autoscaler._private.local.config", "get_state_path", item)
    expect(path("mine").endswith("cluster-mine.state"), item, f"the file is {path('mine')}")
    assert ray_internals.launcher_state_file("mine") == Path(path("mine"))


def test_find_head() -> None:
    item = "find_head"
    for name in ("bootstrap_config", "get_head_node_ip"):
        parameters = list(inspect.signature(private("ray.autoscaler.sdk", name, item)).parameters)
        expect(parameters[0] == "cluster_config", item, f"{name} takes {parameters}")


def test_launcher_command() -> None:
    item = "launcher_command"
    expect_in_source("ray.scripts.scripts", 'if __name__ == "__main__":', item)


def test_prepare_and_validate_launcher_file() -> None:
    """The public `fillout_defaults` would do, if it merged the set-up commands."""
    item = "prepare_launcher_file"
    util = "ray.autoscaler._private.util"
    for name in ("prepare_config", "validate_config"):
        parameters = list(inspect.signature(private(util, name, item)).parameters)
        expect(parameters == ["config"], item, f"{name} takes {parameters}")
    config = {
        "cluster_name": "c",
        "provider": {"type": "aws", "region": "us-east-1"},
        "auth": {"ssh_user": "me"},
        "setup_commands": ["common"],
        "worker_setup_commands": ["worker"],
        "head_node_type": "head",
        "available_node_types": {"head": {"node_config": {}, "resources": {}}},
    }
    prepared = ray_internals.prepare_launcher_file(config)
    found = prepared["worker_setup_commands"]
    expect(found == ["common", "worker"], item, f"the set-up commands of workers are {found}")
    ray_internals.validate_launcher_file(prepared)


@pytest.mark.parametrize(
    ("item", "module", "text"),
    [
        ("HEAD_CLUSTER_FILE", "ray.autoscaler._private.commands", "~/ray_bootstrap_config.yaml"),
        (
            "LAUNCHER_V2_ENV_VAR",
            "ray.autoscaler._private.commands",
            '"RAY_UP_enable_autoscaler_v2"',
        ),
        ("STARTUP_TIMEOUT_MESSAGE", "ray._private.node", "timed out during startup"),
        ("JOB_STOP_WAIT_ENV_VAR", "ray.dashboard.modules.job.job_supervisor", "STOP_WAIT_TIME_S"),
        ("JOB_EXISTS_MESSAGE", "ray.dashboard.modules.job.job_manager", "already exists"),
    ],
)
def test_names_and_messages(item: str, module: str, text: str) -> None:
    assert text.strip('"') in str(getattr(ray_internals, item))
    expect_in_source(module, text, item)


@pytest.mark.parametrize(
    ("item", "module", "name"),
    [
        ("DASHBOARD_AGENT_PORT", RAY_CONSTANTS, "DEFAULT_DASHBOARD_AGENT_LISTEN_PORT"),
        ("JOB_CONFIG_ENV_VAR", "ray._private.runtime_env.constants", "RAY_JOB_CONFIG_JSON_ENV_VAR"),
        ("PREEMPTION_WATCHER_ENV_VAR", TRAIN_CONSTANTS, "ENABLE_PREEMPTION_WATCHER_ENV_VAR"),
    ],
)
def test_constants(item: str, module: str, name: str) -> None:
    found = private(module, name, item)
    expect(found == getattr(ray_internals, item), item, f"{module}.{name} is {found!r}")


def test_lost_driver_errors() -> None:
    item = "LOST_DRIVER_ERRORS"
    errors = {
        each.value for each in private("ray.dashboard.modules.job.common", "JobErrorType", item)
    }
    missing = {*ray_internals.LOST_DRIVER_ERRORS} - errors
    expect(not missing, item, f"JobErrorType has no {sorted(missing)}")


def test_session_metrics_folder() -> None:
    item = "SESSION_METRICS_FOLDER"
    latest = private("ray._private.ray_constants", "SESSION_LATEST", item)
    expect(latest in ray_internals.SESSION_METRICS_FOLDER.parts, item, f"the session is {latest}")
    metrics = "ray.dashboard.modules.metrics.metrics_head"
    expect_in_source(metrics, '"metrics"', item)


def test_raylet_flags() -> None:
    item = "RAYLET_FLAGS"
    start = inspect.getsource(private("ray._private.services", "start_raylet", item))
    for flag in ray_internals.RAYLET_FLAGS.values():
        expect(f'f"--{flag}=' in start, item, f"a raylet is started without --{flag}")


def test_forked_ray_settings() -> None:
    item = "FORKED_RAY_SETTINGS"
    raylet = Path(private("ray").__file__).parent / "core/src/ray/raylet/raylet"
    names = [name.removeprefix("RAY_") for name in ray_internals.FORKED_RAY_SETTINGS]
    program = raylet.read_bytes()
    for name in names:
        expect(name.encode() in program, item, f"the raylet has no setting {name}")
    expect_in_source("ray.dashboard.consts", names[1], item)


def test_reload_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    config = private("ray._raylet", "Config", "reload_configuration")
    kept = config.worker_register_timeout_seconds()
    monkeypatch.setenv("RAY_worker_register_timeout_seconds", str(kept + 5))
    ray_internals.reload_configuration()
    read = config.worker_register_timeout_seconds()
    monkeypatch.delenv("RAY_worker_register_timeout_seconds")
    ray_internals.reload_configuration()
    expect(read == kept + 5, "reload_configuration", "Config.initialize reads no environment")
    assert config.worker_register_timeout_seconds() == kept


def test_undrawn_identifiers() -> None:
    item = "undrawn_identifiers"
    module = private("ray.actor")
    drawn = private("ray.actor", "ActorClassID", item)
    expect_in_source("ray.actor", "ActorClassID.from_random()", item)
    with ray_internals.undrawn_identifiers():
        first, second = (module.ActorClassID.from_random() for _ in range(2))
    assert type(first) is drawn
    assert first != second
    assert module.ActorClassID is drawn


def test_run_ray_command() -> None:
    expect_in_source("ray.scripts.scripts", "def main():", "run_ray_command")
    code = "from cluster.connection.ray_internals import run_ray_command as run; run(['--version'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, ray.__version__ in done.stdout) == (0, True), done.stderr


def test_leftovers_of_jobs(ray_cluster: str) -> None:
    item = "leftovers_of_jobs"
    state = private("ray._private.state", "GlobalState.actor_table", item)
    expect("actor_id" in inspect.signature(state).parameters, item, "actor_table has no actor_id")

    @ray.remote(num_cpus=0)
    class Left:
        def is_there(self) -> bool:
            return True

    actor = Left.remote()
    assert ray.get(actor.is_there.remote())
    found = ray_internals.leftovers_of_jobs()
    expect(any(actor._actor_id.hex() in each for each in found), item, f"it finds {found}")
    ray.kill(actor)


def test_other_drivers(ray_cluster: str) -> None:
    item = "other_drivers"
    table = private("ray.core.generated.gcs_pb2", "JobTableData", item)
    expect("is_dead" in fields(table), item, "JobTableData has no is_dead")
    assert ray.get_runtime_context().get_job_id() not in ray_internals.other_drivers()
