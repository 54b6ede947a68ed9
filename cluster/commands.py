"""The lines of shell that run on a cluster's hosts: set-up, the head's start, a worker's start.

Each line stands alone, since Ray's launcher runs each in a shell of its own, and may be run again
on a host where it has been run before: nothing is started twice, and nothing that runs is stopped.
"""

import json
import shlex
from collections.abc import Mapping

from cluster.emit import Folded
from cluster.spec import ClusterSpec, Provider

PROJECT = "~/heliostat"
"""Where this checkout is on the hosts."""
TOKEN = "~/.ray/auth_token"
HOME = "~/.heliostat"
"""What runs beside Ray on a host keeps its files here."""
CLIENTS = {
    "aws": ["boto3"],
    "gcp": ["google-api-python-client"],
    "azure": ["azure-identity", "azure-mgmt-compute", "azure-mgmt-network", "azure-mgmt-resource"],
}
"""What Ray's launcher and autoscaler ask a cloud with."""

_DETECTION = {
    "RAY_health_check_initial_delay_ms": 0,
    "RAY_health_check_period_ms": 1000,
    "RAY_health_check_timeout_ms": 2500,
    "RAY_health_check_failure_threshold": 3,
}
"""A node that is silent for 10 s is dead; one that is busy for 7 s is not. Ray's own is 45 s."""
_AUTOSCALER = {"AUTOSCALER_HEARTBEAT_TIMEOUT_S": 10, "AUTOSCALER_UPDATE_INTERVAL_S": 2}
"""How soon Ray is started again on a host that is back; 30 and 5 s otherwise."""
_RECONNECT_S = 600
"""How long workers wait for a head that keeps its state; 60 s otherwise."""


def setup(spec: ClusterSpec, provider: Provider) -> list[Folded]:
    """On every host, once: the environment at the versions of constraints.txt."""
    owned = Folded([f"mkdir -p {HOME} && chmod 700 {HOME} ~/.ray && chmod 600 {TOKEN}"])
    shells = Folded(
        [
            f"grep -qs RAY_AUTH_MODE ~/.bashrc ||",
            f"sed -i '1i export RAY_AUTH_MODE=token PATH={spec.venv}/bin:$PATH' ~/.bashrc",
        ]
    )
    if spec.setup == "installed":
        return [owned, shells]
    extras = CLIENTS.get(provider, []) + _mlflow_packages(spec)
    return [
        Folded(
            [
                f"{spec.python} -c 'import ensurepip' 2>/dev/null ||",
                "(sudo apt-get -o DPkg::Lock::Timeout=600 update -qq &&",
                "sudo apt-get -o DPkg::Lock::Timeout=600 install -y -qq python3-venv)",
            ]
        ),
        Folded([f"test -x {spec.venv}/bin/python || {spec.python} -m venv {spec.venv}"]),
        Folded(
            [
                f"{spec.venv}/bin/pip install -q -c {PROJECT}/constraints.txt",
                " ".join([PROJECT, *extras]),
            ]
        ),
        owned,
        shells,
    ]


def head_start(spec: ClusterSpec, provider: Provider) -> list[Folded]:
    """On the head, at every `up`: Ray, the MLflow server and the agent."""
    address = spec.local.head if provider == "local" and spec.local else "$(hostname -I | cut -d' ' -f1)"
    exports = [*_exports(spec, address, "head"), _assignments(_DETECTION)]
    if provider == "local":
        exports.append(_assignments(_AUTOSCALER))
    if spec.state is not None:
        exports.append(_state(spec))
    resources = {"CPU": 0}
    if provider == "local" and spec.local is not None:
        resources = spec.local.head_resources
    start = [
        "ray start --head --port=6379 --dashboard-host=127.0.0.1 --disable-usage-stats",
        "--autoscaling-config=~/ray_bootstrap_config.yaml",
        *_resources(resources if provider == "local" else {}),
        *_labels(spec, provider),
    ]
    running = f"{_running('gcs_server')} && {_running('raylet')}"
    lines = [
        _export(exports),
        f"{running} || {{ {_stop_remains()}",
        "ulimit -n 65536;",
        *start[:-1],
        f"{start[-1]}; }}",
    ]
    return [Folded(lines), _mlflow(spec, address), *_agent(spec, provider, address, "head")]


def worker_start(spec: ClusterSpec, provider: Provider) -> list[Folded]:
    """On a worker, at its birth and when Ray has to be started again on it.

    Where one runs no second raylet is started: a replaced head starts Ray on all its hosts.
    """
    exports = _exports(spec, "$RAY_HEAD_IP", "worker")
    if spec.state is not None:
        exports.append(f"RAY_gcs_rpc_server_reconnect_timeout_s={_RECONNECT_S}")
    start = ["ray start --address=$RAY_HEAD_IP:6379 --disable-usage-stats"]
    if provider == "local" and spec.local is not None:
        start += _resources(spec.local.worker_resources)
    start += _labels(spec, provider)
    lines = [
        _export(exports),
        f"{_running('raylet')} || {{ ulimit -n 65536;",
        *start[:-1],
        f"{start[-1]}; }}",
    ]
    if provider == "local":
        # Ray never comes back to a host of its own on which this has failed once.
        lines[-1] += " || true"
    return [Folded(lines), *_agent(spec, provider, "$RAY_HEAD_IP", "worker")]


def _exports(spec: ClusterSpec, head: str, role: str) -> list[str]:
    """What Ray, its workers and jobs find in their environment."""
    port = spec.mlflow.port
    exports = [
        f"PATH={spec.venv}/bin:$PATH RAY_AUTH_MODE=token HELIOSTAT_ROLE={role}",
        f"MLFLOW_TRACKING_URI=http://{head}:{port}",
    ]
    if spec.mlflow.auth:
        exports.append(f"MLFLOW_TRACKING_USERNAME=admin MLFLOW_TRACKING_PASSWORD={_password()}")
    return exports


def _export(exports: list[str]) -> str:
    return f"export {' '.join(exports)};"


def _assignments(values: Mapping[str, object]) -> str:
    return " ".join(f"{name}={value}" for name, value in values.items())


def _state(spec: ClusterSpec) -> str:
    """Ray's own state where it outlives the head: RocksDB in a folder, or the user's Redis."""
    assert spec.state is not None
    if spec.state.startswith("redis://"):
        host = spec.state.removeprefix("redis://").rstrip("/")
        return f"RAY_REDIS_ADDRESS={host} RAY_external_storage_namespace={spec.name}"
    return f"RAY_gcs_storage=rocksdb RAY_gcs_storage_path={spec.state}"


def _running(program: str) -> str:
    return f'pgrep -u "$(id -u)" -x {program} >/dev/null'


def _stop_remains() -> str:
    """What a head that died in part has left would keep the new one from its port."""
    return f"! {_running(chr(39) + 'gcs_server|raylet' + chr(39))} || ray stop --force >/dev/null;"


def _resources(resources: Mapping[str, int]) -> list[str]:
    """Options of `ray start`; what Ray has no option for goes into one."""
    options = {"CPU": "num-cpus", "GPU": "num-gpus", "memory": "memory"}
    options["object_store_memory"] = "object-store-memory"
    known = [f"--{options[key]}={value}" for key, value in resources.items() if key in options]
    other = {key: value for key, value in resources.items() if key not in options}
    if other:
        known.append(f"--resources={shlex.quote(json.dumps(other))}")
    return [" ".join(known)] if known else []


def _labels(spec: ClusterSpec, provider: Provider) -> list[str]:
    """On hosts of one's own; a cloud's node types have theirs in the file."""
    if provider != "local" or spec.local is None or spec.local.usd_per_hour is None:
        return []
    return [f"--labels=heliostat.io/usd-per-hour={spec.local.usd_per_hour:g}"]


def _mlflow_packages(spec: ClusterSpec) -> list[str]:
    packages = ["'mlflow[auth]'"] if spec.mlflow.auth else []
    if spec.mlflow.database is not None and spec.mlflow.database.startswith("postgresql"):
        packages.append("psycopg2-binary")
    if spec.mlflow.artifacts is not None and spec.mlflow.artifacts.startswith("s3:"):
        packages.append("boto3")
    return packages


def _password() -> str:
    """One password that every holder of the cluster's token can work out."""
    return f"$( (echo mlflow; cat {TOKEN}) | sha256sum | cut -c1-32)"


def _mlflow(spec: ClusterSpec, address: str) -> Folded:
    """The server, on the private address alone, for clients that call it by that or by a tunnel."""
    mlflow = spec.mlflow
    folder = f"{HOME}/mlflow"
    database = shlex.quote(mlflow.database) if mlflow.database else "sqlite:///$HOME/.heliostat/mlflow/mlflow.db"
    lines = [
        f"export PATH={spec.venv}/bin:$PATH HELIOSTAT_IP={address}; mkdir -p {folder};",
        f'echo "http://$HELIOSTAT_IP:{mlflow.port}" > {HOME}/mlflow_uri;',
    ]
    server = [
        f"mlflow server --host $HELIOSTAT_IP --port {mlflow.port} --workers 1",
        f'--allowed-hosts "$HELIOSTAT_IP:{mlflow.port},127.0.0.1:*,localhost:*"',
        f"--backend-store-uri {database}",
        f"--artifacts-destination {mlflow.artifacts or folder + '/artifacts'}",
    ]
    if mlflow.auth:
        lines += _auth_file(folder)
        server.append("--app-name basic-auth")
    pattern = shlex.quote("[m]lflow server")
    return Folded(
        [
            *lines,
            f'pgrep -u "$(id -u)" -f {pattern} >/dev/null ||',
            f"setsid nohup {server[0]}",
            *server[1:],
            f">>{HOME}/mlflow.log 2>&1 </dev/null &",
        ]
    )


def _auth_file(folder: str) -> list[str]:
    """MLflow's own settings of its users: an administrator, and nothing for anybody else."""
    file = f"{folder}/auth.ini"
    settings = [
        "[mlflow]",
        "default_permission = NO_PERMISSIONS",
        "database_uri = sqlite:///$HOME/.heliostat/mlflow/auth.db",
        "admin_username = admin",
        f"admin_password = {_password()}",
    ]
    text = "\\n".join(settings)
    return [
        f'(umask 077; printf "{text}\\n" > {file});',
        f"export MLFLOW_AUTH_CONFIG_PATH={file} MLFLOW_FLASK_SERVER_SECRET_KEY={_password()};",
    ]


def _agent(spec: ClusterSpec, provider: Provider, head: str, role: str) -> list[Folded]:
    """The watcher of the cloud's notices; hosts of one's own get none."""
    if provider == "local":
        return []
    exports = [f"PATH={spec.venv}/bin:$PATH RAY_AUTH_MODE=token HELIOSTAT_CLOUD={provider}"]
    exports.append(f"HELIOSTAT_ROLE={role} RAY_ADDRESS={head}:6379")
    if role == "head" and spec.fallback_after_s is not None:
        exports.append(f"HELIOSTAT_FALLBACK_AFTER_S={spec.fallback_after_s:g}")
    pattern = shlex.quote("[c]luster.agent")
    return [
        Folded(
            [
                _export(exports),
                f'pgrep -u "$(id -u)" -f {pattern} >/dev/null ||',
                "setsid nohup python -m cluster.agent",
                f">>{HOME}/agent.log 2>&1 </dev/null &",
            ]
        )
    ]
