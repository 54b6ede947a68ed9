"""Prometheus and Grafana on the head: what one line of the cluster's file (`metrics`) starts.

    python -m cluster.node.prometheus_server

Both listen on the head's loopback alone, since what Ray exports asks for no token. Prometheus takes
its targets from the list of nodes that Ray keeps; where it is not installed its release is fetched.
Grafana is started where it is installed, with Ray's settings, and finds our dashboard beside Ray's.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import urllib.request
from pathlib import Path

from cluster.node.preemption_agent import PID_FILE, log_event, replace_running_instance

GRAFANA_DASHBOARD = Path(__file__).with_name("grafana.json")
METRICS_FOLDER = Path("/tmp/ray/session_latest/metrics")
"""Where Ray's head writes the configuration of Prometheus and Grafana."""
PROMETHEUS_VERSION = "3.5.0"
"""The release that is fetched, of Prometheus' long-term support."""
_RELEASES = "https://github.com/prometheus/prometheus/releases/download"


def install_dashboard(session: Path = METRICS_FOLDER) -> Path:
    """Put our dashboard beside Ray's, where Grafana finds it; Ray has to be there."""
    folder = session / "grafana" / "dashboards"
    folder.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(GRAFANA_DASHBOARD, folder / "heliostat_grafana_dashboard.json"))


def prometheus_command(home: Path, session: Path = METRICS_FOLDER) -> list[str] | None:
    """How Prometheus is started here; None where there is none and none can be fetched."""
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


def grafana_command(session: Path = METRICS_FOLDER) -> list[str] | None:
    """How Grafana is started here, with Ray's settings; None where it is not installed."""
    program = shutil.which("grafana")
    home = Path("/usr/share/grafana")
    if program is None or not home.exists():
        return None
    return [program, "server", f"--homepath={home}", f"--config={session / 'grafana/grafana.ini'}"]


def _download_prometheus(folder: Path) -> Path | None:
    """The program in Prometheus' own release for this machine, fetched once."""
    program = folder / "prometheus"
    if program.exists():
        return program
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine)
    name = f"prometheus-{PROMETHEUS_VERSION}.linux-{machine}"
    building = folder.with_name(f"{folder.name}.{os.getpid()}")
    try:
        url = f"{_RELEASES}/v{PROMETHEUS_VERSION}/{name}.tar.gz"
        with (
            urllib.request.urlopen(url, timeout=60) as data,
            tarfile.open(fileobj=data, mode="r|gz") as archive,
        ):
            archive.extractall(building, filter="data")
        (building / name).rename(folder)
    except OSError as error:
        log_event(f"Prometheus {PROMETHEUS_VERSION} cannot be fetched: {error}")
        return None
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return program


def main() -> None:
    """Start what there is, and stay until all of it has ended."""
    home = PID_FILE.expanduser().parent
    replace_running_instance(home / "metrics.pid")
    while not (
        METRICS_FOLDER / "prometheus" / "prometheus.yml"
    ).exists():  # the dashboard writes it
        time.sleep(1)
    log_event(f"dashboard: {install_dashboard()}")
    programs = {"Prometheus": prometheus_command(home), "Grafana": grafana_command()}
    running = []
    environment = {**os.environ, "GF_SERVER_HTTP_ADDR": "127.0.0.1"}
    for name, command in programs.items():
        if command is None:
            log_event(f"{name} is not here")
            continue
        log_event(f"{name}: {' '.join(command)}")
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
