"""Starts Prometheus and Grafana on the head, if the cluster's file has `metrics`.

    python -m cluster.node.prometheus_server

Both listen on the head's loopback interface only, since Ray's metrics need no token. Prometheus
reads its targets from the list of nodes that Ray writes; if it is not installed, its release is
downloaded. Grafana is started if it is installed, with Ray's settings, and shows Heliostat's
dashboard beside Ray's.
"""

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import urllib.request
from pathlib import Path

from cluster.connection.ray_internals import SESSION_METRICS_FOLDER
from cluster.node.host_program import HOST_FOLDER, log_to_stdout, replace_running_instance

GRAFANA_DASHBOARD = Path(__file__).with_name("grafana.json")
PROMETHEUS_VERSION = "3.5.0"
"""The release that is downloaded, which has long-term support."""
_RELEASES = "https://github.com/prometheus/prometheus/releases/download"

logger = logging.getLogger(__name__)


def install_dashboard(session: Path = SESSION_METRICS_FOLDER) -> Path:
    """Copy Heliostat's dashboard beside Ray's, where Grafana finds it; returns its path.

    `session` is the folder in which Ray has written its configuration of Prometheus and Grafana.
    """
    folder = session / "grafana" / "dashboards"
    folder.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(GRAFANA_DASHBOARD, folder / "heliostat_grafana_dashboard.json"))


def prometheus_command(home: Path, session: Path = SESSION_METRICS_FOLDER) -> list[str] | None:
    """The command that starts Prometheus; None if it is not installed and cannot be downloaded."""
    program = shutil.which("prometheus") or _download_prometheus(
        home / f"prometheus-{PROMETHEUS_VERSION}"
    )
    if program is None:
        return None
    return [
        str(program),
        f"--config.file={session / 'prometheus' / 'prometheus.yml'}",
        f"--storage.tsdb.path={home / 'prometheus'}",
        "--web.listen-address=127.0.0.1:9090",
    ]


def grafana_command(session: Path = SESSION_METRICS_FOLDER) -> list[str] | None:
    """The command that starts Grafana with Ray's settings; None if it is not installed."""
    program = shutil.which("grafana")
    home = Path("/usr/share/grafana")
    if program is None or not home.exists():
        return None
    return [program, "server", f"--homepath={home}", f"--config={session / 'grafana/grafana.ini'}"]


def _download_prometheus(folder: Path) -> Path | None:
    """Download Prometheus for this machine to `folder`, once; the program, or None."""
    program = folder / "prometheus"
    if program.exists():
        return program
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine)
    name = f"prometheus-{PROMETHEUS_VERSION}.linux-{machine}"
    staging = folder.with_name(f"{folder.name}.{os.getpid()}")
    try:
        url = f"{_RELEASES}/v{PROMETHEUS_VERSION}/{name}.tar.gz"
        with (
            urllib.request.urlopen(url, timeout=60) as data,
            tarfile.open(fileobj=data, mode="r|gz") as archive,
        ):
            archive.extractall(staging, filter="data")
        (staging / name).rename(folder)
    except OSError as error:
        logger.warning("Prometheus %s cannot be downloaded: %s", PROMETHEUS_VERSION, error)
        return None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return program


def main() -> None:
    """Start what is installed, and wait until all of it has ended."""
    log_to_stdout()
    home = HOST_FOLDER.expanduser()
    replace_running_instance(home / "metrics.pid")
    # Ray's dashboard writes this file when it starts.
    while not (SESSION_METRICS_FOLDER / "prometheus" / "prometheus.yml").exists():
        time.sleep(1)
    logger.info("dashboard: %s", install_dashboard())
    programs = {"Prometheus": prometheus_command(home), "Grafana": grafana_command()}
    running = []
    environment = {**os.environ, "GF_SERVER_HTTP_ADDR": "127.0.0.1"}
    for name, command in programs.items():
        if command is None:
            logger.info("%s is not installed", name)
            continue
        logger.info("%s: %s", name, " ".join(command))
        running.append(subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL))
    try:
        for process in running:
            process.wait()
    finally:
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    main()
