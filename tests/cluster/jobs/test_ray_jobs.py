"""Jobs on a real Ray with a token: started once, followed, stopped, started again if lost."""

import io
import json
import os
import signal
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.base.errors import ClusterError, SpecError
from cluster.jobs import job_supervisor, ray_jobs
from cluster.jobs.job import Job, Submission
from cluster.jobs.job_supervisor import poll_once
from cluster.jobs.log_follower import LogFollower, read_log
from cluster.jobs.working_dir_package import Package, build_package

Wait = Callable[..., None]
LIMIT_S = 600


@pytest.fixture
def url(job_cluster: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """The job server, for a user who has the token."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", job_cluster.environment["RAY_AUTH_TOKEN"])
    return str(job_cluster.url)


@pytest.fixture
def package(tmp_path: Path) -> Package:
    (tmp_path / "sent.txt").write_text(f"sent along: {tmp_path.name}\n")
    return build_package(tmp_path)


@pytest.fixture
def work(
    url: str, job_cluster: Any, package: Package, tmp_path: Path, wait_until: Wait
) -> Iterator["Work"]:
    """A job that runs until `end` is called."""
    begun = Work(url, tmp_path.name.replace("_", "-"), job_cluster.folder, wait_until)
    job, new = ray_jobs.submit(url, begun.planned, package)
    assert (new, job.attempt) == (True, 1)
    begun.pid()
    yield begun
    (job_cluster.folder / f"{begun.name}.end").touch()


class Work:
    def __init__(self, url: str, name: str, folder: Path, wait_until: Wait) -> None:
        self.url, self.name, self.folder, self._wait_until = url, name, folder, wait_until
        self.planned = Submission(name, ("stand", "work", "0", name))

    def pid(self, after: int = 0) -> int:
        """The process of its driver, as soon as it is not `after`."""
        file, found = self.folder / f"{self.name}.pid", [0]

        def changed() -> bool:
            found[0] = int(file.read_text()) if file.exists() else 0
            return found[0] not in (0, after)

        self._wait_until(changed)
        return found[0]

    def starts(self) -> list[str]:
        return (self.folder / f"{self.name}.starts").read_text().splitlines()

    def end(self) -> None:
        (self.folder / f"{self.name}.end").touch()


def printed(log: str) -> str:
    """A log without a line of Ray's that may stand anywhere among the driver's first lines.

    Ray's supervisor writes it before it starts the driver, and flushes it afterwards (Ray 2.60).
    """
    lines = log.splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("Running entrypoint for job "))


def attack(url: str, token: str | None, marker: Path) -> int:
    """Submit a command, as the ShadowRay attack does; the HTTP status of the answer."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    data = json.dumps({"entrypoint": f"touch {marker}"}).encode()
    request = urllib.request.Request(url, data, {**headers, "Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_without_the_token_nothing_is_run(job_cluster: Any, tmp_path: Path) -> None:
    """CVE-2023-48022, on the head's job server and on the agent that every node has."""
    token = job_cluster.environment["RAY_AUTH_TOKEN"]
    marker = tmp_path / "got-in"
    agent = f"http://127.0.0.1:{job_cluster.agent_port}/api/job_agent/jobs/"
    for server in (f"{job_cluster.url}/api/jobs/", agent):
        assert attack(server, None, marker) == 401
        assert attack(server, "f" * 64, marker) == 403
    assert not marker.exists()
    request = urllib.request.Request(
        f"{job_cluster.url}/api/jobs/", headers={"Authorization": f"Bearer {token}"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert not [job for job in json.load(answer) if "got-in" in job["entrypoint"]]


@pytest.mark.parametrize(("token", "line"), [("", "asks for the"), ("f" * 64, "refuses the")])
def test_a_missing_or_wrong_token_is_one_line(
    job_cluster: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, token: str, line: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    with pytest.raises(ClusterError, match=f"{line} token|{line} cluster's token"):
        ray_jobs.list_jobs(job_cluster.url)


def test_following_a_job_returns_its_exit_code(url: str, package: Package, tmp_path: Path) -> None:
    name = "ends-with-7"
    job, new = ray_jobs.submit(url, Submission(name, ("stand", "print", "7", name)), package)
    assert new
    output, told = io.StringIO(), []
    job = LogFollower(name, output, told.append).follow(url)
    assert (job.status, job.shell_exit_code, told) == ("FAILED", 7, [])
    assert f"start 1 of {name}\nsent along: {tmp_path.name}\n" in printed(output.getvalue())
    assert "step" not in output.getvalue()  # progress is for terminals
    assert f"start 1 of {name}\nsent along" in printed(read_log(url, job))
    again, new = ray_jobs.submit(url, Submission(name, job.argv), package)
    assert (again, new) == (job, False)


def test_a_name_is_started_once(work: Work, package: Package) -> None:
    """Even by several clients at once; and a name cannot be used for another command."""
    several = [
        threading.Thread(target=lambda: ray_jobs.submit(work.url, work.planned, package))
        for _ in range(3)
    ]
    for each in several:
        each.start()
    for each in several:
        each.join(LIMIT_S)
    other = replace(work.planned, argv=("stand", "work", "1", work.name))
    with pytest.raises(SpecError, match=f"--name {work.name}: a job of this name was started as"):
        ray_jobs.submit(work.url, other, package)
    assert len(work.starts()) == 1
    assert [job.name for job in ray_jobs.list_jobs(work.url)].count(work.name) == 1


@pytest.mark.parametrize("victim", ["driver", "supervisor"])
def test_a_lost_driver_is_started_again(work: Work, victim: str) -> None:
    """After the loss of the driver, or of Ray's supervisor. The log goes on."""
    output, told = io.StringIO(), []
    ended: list[Job] = []
    follower = LogFollower(work.name, output, told.append)
    thread = threading.Thread(target=lambda: ended.append(follower.follow(work.url)))
    thread.start()
    first = work.pid()
    os.kill(first if victim == "driver" else parent(first), signal.SIGKILL)
    work.pid(after=first)
    work.end()
    thread.join(LIMIT_S)
    (job,) = ended
    assert (job.status, job.attempt, job.shell_exit_code) == ("SUCCEEDED", 2, 0)
    assert len(told) == 1
    assert "started again (1 of 5)" in told[0]
    plain = " ".join(work.planned.argv)
    assert work.starts() == [plain, f"{plain} --or-resume"]
    assert f"start 1 of {work.name}\n" in output.getvalue()
    assert f"start 2 of {work.name}\nsent along" in printed(output.getvalue())
    assert output.getvalue().rstrip().endswith("done")


def parent(pid: int) -> int:
    """The id of the parent process."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_a_stopped_job_saves_and_stays_stopped_until_it_is_resumed(
    work: Work, package: Package
) -> None:
    job = ray_jobs.stop(work.url, work.name)
    assert (job.status, job.attempt) == ("STOPPED", 1)
    assert (work.folder / f"{work.name}.saved").exists()
    assert poll_once(work.url, {}) == []
    assert ray_jobs.submit(work.url, work.planned, package) == (job, False)
    words = ("stand", "work", "0", work.name, "--resume", work.name)
    resumed, new = ray_jobs.submit(work.url, replace(work.planned, argv=words), package)
    assert (new, resumed.attempt) == (True, 2)


def test_two_supervisors_start_a_lost_job_again_once(work: Work, wait_until: Wait) -> None:
    first = work.pid()
    os.kill(first, signal.SIGKILL)
    lines: list[str] = []
    pinned: dict[str, float] = {}

    def restarted() -> bool:
        supervisors = [
            threading.Thread(target=lambda: lines.extend(poll_once(work.url, pinned)))
            for _ in range(2)
        ]
        for each in supervisors:
            each.start()
        for each in supervisors:
            each.join(LIMIT_S)
        return bool(lines)

    wait_until(restarted)
    assert f"{work.name}: its driver was killed by signal 9" in lines[0]
    work.pid(after=first)
    assert len(work.starts()) == 2


def test_ctrl_c_leaves_the_job_running_and_prints_how_to_return(
    work: Work, job_cluster: Any
) -> None:
    command = ["heliostat", "logs", work.name, "--follow", "--address", work.url]
    following = subprocess.Popen(
        ["env", "--default-signal=INT", *command],
        env=job_cluster.environment,
        cwd=work.folder,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert following.stdout
    for line in following.stdout:
        if line.startswith("sent along"):
            break
    following.send_signal(signal.SIGINT)
    rest = following.stdout.read()
    assert following.wait(LIMIT_S) == 130
    assert f"detached; {work.name} goes on" in rest
    assert f"heliostat logs {work.name} --follow --address {work.url}" in rest
    assert f"heliostat stop {work.name} --address {work.url}" in rest
    job = ray_jobs.get_job(work.url, work.name)
    assert job.status == "RUNNING"


def test_an_unknown_name_is_an_error_with_a_similar_one(work: Work) -> None:
    with pytest.raises(SpecError, match=f"no job '{work.name}x' on .*did you mean '{work.name}'"):
        ray_jobs.get_job(work.url, f"{work.name}x")


FAILED = Job("a", 1, "FAILED", ("train",), "gcs://p.zip", 0.0, None, "n1", None, None, "")


def test_the_number_of_restarts_is_limited() -> None:
    lost_often = replace(FAILED, exit_code=-9, attempt=job_supervisor.MAX_RESTARTS + 1)
    assert job_supervisor.restart_if_lost("http://127.0.0.1:9", lost_often, frozenset()) is None
