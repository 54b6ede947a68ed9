"""Shell commands for a cluster's hosts: set-up, start of the head, start of a worker.

Ray's launcher runs each command in a shell of its own. A command can run again on a host where it
has run before: it starts no program twice and stops none that works.
"""

import hashlib
import json
import shlex
from collections.abc import Mapping

from cluster.base.labels import USD_PER_HOUR
from cluster.definition.commented_yaml import ShellCommand
from cluster.definition.spec import ClusterSpec, Provider

REMOTE_PROJECT = "~/heliostat"
"""Path of this checkout on the hosts."""
TOKEN_FILE = "~/.ray/auth_token"
SSH_INGRESS_PROGRAM = "cluster.lifecycle.aws_ssh_ingress"
_ONE_AT_A_TIME = ("cluster.jobs.job_supervisor", "cluster.node.host_reprovisioner")
"""Programs of which only the first instance runs; a second one ends at once."""
CLUSTER_ENV_VAR = "HELIOSTAT_CLUSTER"
"""Environment variable with the cluster's name, by which `down` finds the processes to end."""
HOST_FOLDER = "~/.heliostat"
"""Files of our programs on a host."""
EXAMPLE_DATABASE = "postgresql://mlflow@db.internal/mlflow"
EXAMPLE_ARTIFACTS = "s3://my-bucket/mlflow"
CLOUD_PACKAGES = {
    "aws": ["boto3"],
    "gcp": ["google-api-python-client"],
    "azure": [
        "azure-core==1.35.0",
        "azure-identity==1.23.1",
        "azure-mgmt-compute==35.0.0",
        "azure-mgmt-network==29.0.0",
        "azure-mgmt-resource==24.0.0",
        "azure-common==1.1.28",
        "msrest==0.7.1",
        "msrestazure==0.6.4.post1",
    ],
}
"""Cloud clients that Ray's launcher and autoscaler need; Azure's are pinned as in Ray 2.60."""

_FAILURE_DETECTION = {
    "RAY_health_check_initial_delay_ms": 0,
    "RAY_health_check_period_ms": 1000,
    "RAY_health_check_timeout_ms": 2500,
    "RAY_health_check_failure_threshold": 3,
}
"""Ray gives up a node that is silent for 10 s, and keeps one that is busy for 6 s."""
_AUTOSCALER = {"AUTOSCALER_HEARTBEAT_TIMEOUT_S": 10, "AUTOSCALER_UPDATE_INTERVAL_S": 2}
"""Ray starts sooner on a host that has come back; the defaults are 30 and 5 s."""
_AUTH_SETTINGS = (
    "[mlflow]\\ndefault_permission = NO_PERMISSIONS\\ndatabase_uri = sqlite:///auth.db\\n"
    "admin_username = admin\\nauth_cache_ttl_seconds = 60\\n"
    "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\\n"
)
"""Format string for `printf`. Without the cache, each request computes a slow password hash."""
_HEAD_ADDRESS = (
    "$(hostname -I | cut -d' ' -f1)",
    '$(grep -o \'"head_ip": "[^"]*\' ~/ray_bootstrap_config.yaml | cut -d\'"\' -f4)',
)
"""The head's private address: cloud machines have one address, other hosts can have several."""
RAY_START = "python -m cluster.session.forked ray start"
"""Starts Ray so that its workers and drivers are forked. Ray's launcher looks for `ray start`."""
_RECONNECT_S = 600
"""Seconds that workers wait for a lost head whose state is kept; Ray's default is 60 s."""


def setup_commands(spec: ClusterSpec, provider: Provider) -> list[ShellCommand]:
    """Once on every host: create the environment, with the versions in constraints.txt."""
    private_files = ShellCommand(
        [f"mkdir -p {HOST_FOLDER} && chmod 700 {HOST_FOLDER} ~/.ray && chmod 600 {TOKEN_FILE}"]
    )
    login_shells = ShellCommand(
        [
            "grep -qs RAY_AUTH_MODE ~/.bashrc || {",
            f"{{ echo 'export RAY_AUTH_MODE=token PATH={spec.venv}/bin:$PATH';",
            "cat ~/.bashrc; } > ~/.bashrc.new 2>/dev/null; mv ~/.bashrc.new ~/.bashrc; }",
        ]
    )
    if spec.setup == "installed":
        return [private_files, login_shells]
    extras = CLOUD_PACKAGES.get(provider, []) + _mlflow_packages(spec)
    return [
        ShellCommand(
            [
                f"{spec.python} -c 'import ensurepip' 2>/dev/null ||",
                "($(command -v sudo) apt-get update -qq -o DPkg::Lock::Timeout=600 &&",
                "$(command -v sudo) apt-get install -y -qq -o DPkg::Lock::Timeout=600",
                "python3-venv)",
            ]
        ),
        ShellCommand([f"test -x {spec.venv}/bin/python || {spec.python} -m venv {spec.venv}"]),
        ShellCommand(
            [
                _pip(spec),
                " ".join([REMOTE_PROJECT, *extras]),
            ]
        ),
        private_files,
        login_shells,
    ]


def head_setup_commands(spec: ClusterSpec, provider: Provider) -> list[ShellCommand]:
    """Once on the head: on AWS, revoke the SSH ingress from everywhere that Ray's launcher adds."""
    if provider != "aws" or spec.aws is None:
        return []
    group = f"--group {spec.name} --region {spec.aws.region}"
    return [ShellCommand([f"{spec.venv}/bin/python -m {SSH_INGRESS_PROGRAM} {group}"])]


def head_start_commands(spec: ClusterSpec, provider: Provider) -> list[ShellCommand]:
    """On the head at every `up`: start Ray, the MLflow server and our programs.

    If only a part of an earlier head still runs, it is stopped, because it would hold the ports.
    """
    address = _HEAD_ADDRESS[provider == "local"]
    exports = [*_environment(spec, address), *_assignments(_FAILURE_DETECTION)]
    if provider == "local":
        exports += _assignments(_AUTOSCALER)
    if spec.state is not None:
        exports.append(_state_storage(spec))
    resources = {"CPU": 0}
    if provider == "local" and spec.local is not None:
        resources = spec.local.head_resources
    start = [
        f"{RAY_START} --head --port=6379 --dashboard-host=127.0.0.1 --disable-usage-stats",
        "--autoscaling-config=~/ray_bootstrap_config.yaml",
        *_resource_options(resources if provider == "local" else {}),
        *_label_options(spec, provider),
    ]
    folder = [] if spec.state is None or "://" in spec.state else [f"mkdir -p {spec.state};"]
    lines = [
        *_export_lines(exports),
        *folder,
        f"{_process_runs('gcs_server')} && {_process_runs('raylet')} || {{",
        f"if {_process_runs('gcs_server')} || {_process_runs('raylet')};",
        "then ray stop --force >/dev/null; fi;",
        "ulimit -n 65536;",
        *start[:-1],
        f"{start[-1]}; }}",
    ]
    return [
        ShellCommand(lines),
        _mlflow_server(spec, address),
        *_host_programs(spec, provider, head=True),
    ]


def worker_start_commands(spec: ClusterSpec, provider: Provider) -> list[ShellCommand]:
    """On a worker, when it is new and when Ray has to start again: start Ray and our programs.

    A raylet that runs is kept: a replaced head runs these commands on all its hosts.
    """
    exports = _environment(spec, "$RAY_HEAD_IP")
    if spec.state is not None:
        exports.append(f"RAY_gcs_rpc_server_reconnect_timeout_s={_RECONNECT_S}")
    start = [f"{RAY_START} --address=$RAY_HEAD_IP:6379 --disable-usage-stats"]
    if provider == "local" and spec.local is not None:
        start += _resource_options(spec.local.worker_resources)
    start += _label_options(spec, provider)
    lines = [
        *_export_lines(exports),
        f"{_process_runs('raylet')} || {{ ulimit -n 65536;",
        *start[:-1],
        f"{start[-1]}; }}",
    ]
    if provider == "local":
        # The `local` provider never tries a host again on which this has failed once.
        lines[-1] += " || true"
    return [ShellCommand(lines), *_host_programs(spec, provider, head=False)]


def _environment(spec: ClusterSpec, head: str) -> list[str]:
    """Environment of Ray, its workers and jobs."""
    port = spec.mlflow.port
    exports = [
        f"PATH={spec.venv}/bin:$PATH",
        f"RAY_AUTH_MODE=token {_cluster_assignment(spec)}",
        f"MLFLOW_TRACKING_URI=http://{head}:{port}",
    ]
    if spec.storage is not None:
        exports.append(f"HELIOSTAT_STORAGE={spec.storage}")
    if spec.mlflow.auth:
        exports.append(
            f"MLFLOW_TRACKING_USERNAME=admin MLFLOW_TRACKING_PASSWORD={_password_expression()}"
        )
    return exports


def _cluster_assignment(spec: ClusterSpec) -> str:
    return f"{CLUSTER_ENV_VAR}={spec.name}"


def _export_lines(exports: list[str]) -> list[str]:
    first, *rest = exports
    return [f"export {first}", *rest[:-1], f"{rest[-1]};"]


def _assignments(values: Mapping[str, object]) -> list[str]:
    """NAME=VALUE, two on each line."""
    words = [f"{name}={value}" for name, value in values.items()]
    return [" ".join(words[start : start + 2]) for start in range(0, len(words), 2)]


def _state_storage(spec: ClusterSpec) -> str:
    """Settings that keep Ray's state when the head is lost: RocksDB in a folder, or Redis."""
    assert spec.state is not None
    if spec.state.startswith("redis://"):
        host = spec.state.removeprefix("redis://").rstrip("/")
        return f"RAY_REDIS_ADDRESS={host} RAY_external_storage_namespace={spec.name}"
    return f"RAY_gcs_storage=rocksdb RAY_gcs_storage_path={spec.state}"


def _process_runs(program: str) -> str:
    return f'pgrep -u "$(id -u)" -x {program} >/dev/null'


def _resource_options(resources: Mapping[str, int]) -> list[str]:
    """Options of `ray start`; resources without an option of their own go into --resources."""
    options = {"CPU": "num-cpus", "GPU": "num-gpus", "memory": "memory"}
    options["object_store_memory"] = "object-store-memory"
    known = [f"--{options[key]}={value}" for key, value in resources.items() if key in options]
    other = {key: value for key, value in resources.items() if key not in options}
    if other:
        known.append(f"--resources={shlex.quote(json.dumps(other))}")
    return [" ".join(known)] if known else []


def _label_options(spec: ClusterSpec, provider: Provider) -> list[str]:
    """Labels of `local` hosts; node types of clouds have theirs in the file."""
    if provider != "local" or spec.local is None or spec.local.usd_per_hour is None:
        return []
    return [f"--labels={USD_PER_HOUR}={spec.local.usd_per_hour:g}"]


def _mlflow_packages(spec: ClusterSpec) -> list[str]:
    packages = ["'mlflow[auth]'"] if spec.mlflow.auth else []
    if spec.mlflow.database is not None and spec.mlflow.database.startswith("postgresql"):
        packages.append("'psycopg[binary]'")
    if spec.mlflow.artifacts is not None and spec.mlflow.artifacts.startswith("s3:"):
        packages.append("boto3")
    return packages


def mlflow_password(token: str) -> str:
    """The password of MLflow's user `admin` where `mlflow.auth` is set.

    It is derived from the cluster's token, so that users need only one secret.
    """
    return hashlib.sha256(f"mlflow:{token}".encode()).hexdigest()[:32]


def _password_expression() -> str:
    """A shell expression for `mlflow_password`."""
    return f"$(printf 'mlflow:%s' \"$(cat {TOKEN_FILE})\" | sha256sum | cut -c1-32)"


def _mlflow_server(spec: ClusterSpec, address: str) -> ShellCommand:
    """Start the MLflow server on the head's private address, for the cluster and for tunnels.

    Tunnels read the address from a file, since it is not known outside the cluster.
    """
    mlflow = spec.mlflow
    lines = [
        f"export PATH={spec.venv}/bin:$PATH {_cluster_assignment(spec)} HELIOSTAT_IP={address}",
        f"mkdir -p {HOST_FOLDER}/mlflow && cd {HOST_FOLDER}/mlflow",
        f"echo http://$HELIOSTAT_IP:{mlflow.port} > {HOST_FOLDER}/mlflow_uri",
        "export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false",
        f"export MLFLOW_BACKEND_STORE_URI={shlex.quote(mlflow.database or 'sqlite:///mlflow.db')}",
        f"export MLFLOW_ARTIFACTS_DESTINATION={mlflow.artifacts or './artifacts'}",
    ]
    if mlflow.database is None:
        other = f"export MLFLOW_BACKEND_STORE_URI={EXAMPLE_DATABASE}"
        lines.append(f"# {_pip(spec)} 'psycopg[binary]'; {other}")
    if mlflow.artifacts is None:
        lines.append(
            f"# {_pip(spec)} boto3; export MLFLOW_ARTIFACTS_DESTINATION={EXAMPLE_ARTIFACTS}"
        )
    application = ""
    if mlflow.auth:
        application = " --app-name basic-auth"
        lines += [
            f"printf '{_AUTH_SETTINGS}' > auth.ini",
            "export MLFLOW_AUTH_CONFIG_PATH=auth.ini "
            f"MLFLOW_AUTH_ADMIN_PASSWORD={_password_expression()}",
            "export MLFLOW_FLASK_SERVER_SECRET_KEY=$MLFLOW_AUTH_ADMIN_PASSWORD",
        ]
    lines += [
        # The server holds the lock while it lives, so a second server ends at once.
        # nice: Ray's agents must start first, as a raylet ends if it does not reach them in 15 s.
        f"setsid nohup nice flock -n {HOST_FOLDER}/mlflow.lock \\",
        f"  mlflow server --workers 1 --host $HELIOSTAT_IP --port {mlflow.port}{application} \\",
        f'  --allowed-hosts "$HELIOSTAT_IP:{mlflow.port},127.0.0.1:*,localhost:*" \\',
        f"  >>{HOST_FOLDER}/mlflow.log 2>&1 </dev/null &",
    ]
    return ShellCommand(lines, literal=True)


def _pip(spec: ClusterSpec) -> str:
    return f"{spec.venv}/bin/pip install -q -c {REMOTE_PROJECT}/constraints.txt"


def _host_programs(spec: ClusterSpec, provider: Provider, head: bool) -> list[ShellCommand]:
    """Our programs beside Ray. A new one ends an older one of its kind, but for _ONE_AT_A_TIME."""
    programs = _head_programs(spec, provider) if head else {}
    if provider != "local":
        programs["cluster.node.preemption_agent"] = provider  # reads the cloud's notices
    commands = []
    for module, argument in programs.items():
        name = module.rpartition(".")[2]
        lock = f"flock -n {HOST_FOLDER}/{name}.lock " if module in _ONE_AT_A_TIME else ""
        commands.append(
            ShellCommand(
                [
                    f"export PATH={spec.venv}/bin:$PATH RAY_AUTH_MODE=token "
                    f"{_cluster_assignment(spec)};",
                    f"setsid nohup {lock}python -m {module} {argument}".rstrip(),
                    f">>{HOST_FOLDER}/{name}.log 2>&1 </dev/null &",
                ]
            )
        )
    return commands


def _head_programs(spec: ClusterSpec, provider: Provider) -> dict[str, str]:
    """Module -> argument of our programs on the head."""
    programs = {"cluster.jobs.job_supervisor": ""}  # starts jobs again whose driver was lost
    spot = any(node_type.spot for node_type in spec.workers.values())
    if provider == "local":
        # Sets up hosts that come back as empty machines.
        programs["cluster.node.host_reprovisioner"] = ""
    elif spot and spec.fallback_after_s is not None:
        # Lets on-demand nodes take over where spot nodes are unavailable.
        programs["cluster.node.spot_fallback"] = f"{spec.fallback_after_s:g}"
    if spec.metrics:
        programs["cluster.node.prometheus_server"] = ""  # starts Prometheus and Grafana
    return programs
