"""A rack of hosts on one machine: each has its own processes, network, disk and sshd.

The rack is one process in namespaces of its own, with a bridge; a host is a process in namespaces
within, with an overlay over the machine's root as its disk. Killing the rack's process removes
all hosts, their processes, disks and network interfaces. From outside, they are reachable through
this class only. Needs root, Linux, and Debian's openssh-server, iproute2 and rsync.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

HOST_SCRIPT = Path(__file__).with_name("host.sh")
CHECKOUT = Path(__file__).parents[2]
SHARED = "/srv/shared"
"""A folder that all hosts share, as they see it."""

PROGRAMS = ("/usr/sbin/sshd", "ssh", "ssh-keygen", "rsync", "ip", "unshare", "nsenter")
ENVIRONMENT = {
    "PATH": f"{sys.prefix}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "PYTHONPATH": str(CHECKOUT),
    "PYTHONDONTWRITEBYTECODE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HOME": "/root",
    "USER": "root",
    "LANG": "C.UTF-8",
    "TERM": "xterm",
    "SHELL": "/bin/bash",
}
SSHD_CONFIG = """\
Port 22
HostKey /etc/rack/host_key
AuthorizedKeysFile /etc/rack/authorized_keys
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
UseDNS no
StrictModes no
PidFile none
MaxStartups 100
"""


def obstacle() -> str | None:
    """Why this machine cannot run a rack, or None."""
    if os.geteuid() != 0:
        return "needs root"
    for program in PROGRAMS:
        if not shutil.which(program):
            return f"needs {program}"
    probe = (
        "mount --make-rprivate / && mount -t tmpfs tmpfs /mnt && mkdir /mnt/u /mnt/w /mnt/r && "
        "mount -t overlay overlay -o lowerdir=/,upperdir=/mnt/u,workdir=/mnt/w /mnt/r && "
        "ip link add probe type bridge && ip link add one type veth peer name two"
    )
    command = ["unshare", "--mount", "--net", "--pid", "--fork", "sh", "-c", probe]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"no namespaces here: {done.stderr.strip()}" if done.returncode else None


@dataclass(frozen=True)
class Host:
    name: str
    address: str
    process: int
    """Its process 1, as seen from outside."""

    cable: str
    """Its network interface on the rack's side."""


class Rack:
    """Hosts by name. A context manager; all hosts end with it."""

    def __init__(
        self,
        folder: Path,
        addresses: Mapping[str, str],
        gateway: str,
        bits: int = 24,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """All hosts can resolve the names in `addresses`. Every shell gets `environment`."""
        self.folder, self.gateway, self.bits = folder, gateway, bits
        self.addresses = dict(addresses)
        self.environment = {**ENVIRONMENT, **(environment or {})}
        self.hosts: dict[str, Host] = {}
        self.process = 0
        self._keys = folder / "keys"
        self._disks = folder / "disks"

    def __enter__(self) -> "Rack":
        self._disks.mkdir(parents=True)
        self._keys.mkdir(mode=0o700)
        for key in ("id", "host"):
            file = str(self._keys / key)
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", key, "-f", file], check=True
            )
        # A bridge without a hardware address of its own takes one of its ports', and changes it
        # when they change: the hosts would not find one another for a minute.
        script = f"""
            mount --make-rprivate / && mount -t proc proc /proc &&
            mount -t tmpfs -o mode=755 tmpfs {self._disks} && mkdir {self._disks}/shared &&
            ip link set lo up && ip link add bridge address 02:77:ff:ff:ff:fe type bridge &&
            ip addr add {self.gateway}/{self.bits} dev bridge && ip link set bridge up &&
            touch {self._disks}/ready && exec sleep infinity"""
        spaces = ["--pid", "--fork", "--kill-child=SIGKILL", "--mount", "--net", "--uts", "--ipc"]
        started = self._spawn(["unshare", *spaces, "sh", "-c", script], "rack")
        self.process = _child(started)
        _wait(lambda: (self._inside / "ready").exists(), "the rack")
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process, signal.SIGKILL)  # the kernel kills everything within
        _wait(lambda: _ended(self.process), "the end of the rack")
        self.hosts.clear()

    @property
    def shared(self) -> Path:
        """The path outside of the rack of the folder that all hosts see as SHARED."""
        return self._inside / "shared"

    @property
    def _inside(self) -> Path:
        return Path(f"/proc/{self.process}/root{self._disks}")

    @property
    def key(self) -> str:
        """The private key for SSH to every host."""
        return (self._keys / "id").read_text()

    def boot(self, name: str, fresh: bool = True, keys: str | None = None) -> Host:
        """Start a host with an empty disk, or with its old one. Blocks until sshd answers.

        `keys` are the public keys that it accepts, by default the rack's own.
        """
        address, disk = self.addresses[name], self._inside / name
        if fresh and disk.exists():
            shutil.rmtree(disk)
        self._set_up_disk(disk / "upper", keys)
        places = [str(place) for place in (CHECKOUT, Path(sys.prefix)) if _apart(place)]
        # nsenter forks because of --pid, and unshare because of --fork.
        spaces = ["--pid", "--fork", "--kill-child=SIGKILL", "--mount", "--net", "--uts", "--ipc"]
        arguments = [str(HOST_SCRIPT), name, f"{address}/{self.bits}", self.gateway]
        arguments += [f"{self._disks}/{name}", f"{self._disks}/shared"]
        started = self._spawn(
            [*_enter(self.process), "unshare", *spaces, "bash", *arguments, *places], name
        )
        process = _child(_child(started))
        cable = f"to-{name[-12:]}"
        # An address always has the same hardware address, since the other hosts remember it.
        hardware = "02:77:" + ":".join(f"{int(part):02x}" for part in address.split("."))
        inner = Path(f"/proc/{process}/status").read_text().partition("NSpid:")[2].split()[1]
        self._at_the_bridge(
            f"ip link add {cable} type veth peer name eth0 address {hardware} netns {inner} && "
            f"ip link set {cable} master bridge up"
        )
        self.hosts[name] = Host(name, address, process, cable)
        _wait((self.disk(name) / "run/booted").exists, f"host {name}")
        return self.hosts[name]

    def _set_up_disk(self, root: Path, keys: str | None) -> None:
        """Write the files to a disk that make it a host of this rack."""
        etc, home = root / "etc", root / "root"
        (etc / "rack").mkdir(parents=True, exist_ok=True)
        home.mkdir(mode=0o700, exist_ok=True)
        for folder in (root, etc):
            folder.chmod(0o755)
        shutil.copy(self._keys / "host", etc / "rack/host_key")
        (etc / "rack/sshd_config").write_text(SSHD_CONFIG)
        allowed = (self._keys / "id.pub").read_text() if keys is None else keys
        (etc / "rack/authorized_keys").write_text(allowed)
        # No name server: one that does not answer costs 10 s per look-up.
        known = "".join(f"{address} {name}\n" for name, address in self.addresses.items())
        (etc / "hosts").write_text("127.0.0.1 localhost\n" + known)
        (etc / "resolv.conf").write_text("")
        (etc / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
        lines = [f"export {name}='{value}'\n" for name, value in self.environment.items()]
        (home / ".bashrc").write_text("".join(lines))
        (home / ".profile").write_text("")

    def pull(self, name: str) -> None:
        """Pull the power cable: the host ends without notice."""
        host = self.hosts.pop(name)
        self._at_the_bridge(f"ip link set {host.cable} down")
        os.kill(host.process, signal.SIGKILL)
        _wait(lambda: _ended(host.process), f"the end of {name}")
        self._at_the_bridge(f"ip link del {host.cable} 2>/dev/null || true")

    def cut(self, name: str) -> None:
        """Unplug the network."""
        self._at_the_bridge(f"ip link set {self.hosts[name].cable} down")

    def heal(self, name: str) -> None:
        self._at_the_bridge(f"ip link set {self.hosts[name].cable} up")

    def disk(self, name: str) -> Path:
        """The root folder of a running host, as seen from outside."""
        return Path(f"/proc/{self.hosts[name].process}/root")

    def run(
        self, name: str, command: str, check: bool = True, timeout_s: float = 900
    ) -> subprocess.CompletedProcess[str]:
        """Run a line of bash on a host; the output includes stderr."""
        process = self.start(name, command)
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its child processes hold the output open
            output, _ = process.communicate(timeout=60)
            output = f"no end after {timeout_s} s\n{output}"
        assert not check or process.returncode == 0, f"{name}: {command}:\n{output}"
        return subprocess.CompletedProcess(command, process.returncode, output)

    def start(self, name: str, command: str) -> subprocess.Popen[str]:
        """Start a line of bash on a host."""
        inner = ["bash", "-c", command]
        return subprocess.Popen(
            [*_enter(self.hosts[name].process), "--root", "--wd", *inner],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def me(self, command: str, timeout_s: float = 900) -> str:
        """The output of a line of bash in ~/work on the host `me`, which must succeed."""
        logs = "tail -n 60 /tmp/heliostat-*/*.log"
        script = f"cd ~/work; ({command}) || {{ code=$?; {logs}; exit $code; }}"
        return self.run("me", script, timeout_s=timeout_s).stdout

    def processes(self, name: str) -> list[str]:
        """The command lines of all processes of a host, except the rack's own."""
        # The sshd of a connection to a host without power lives on for a while.
        own = ("bash ", "sleep 3600", "sshd: ", "/usr/sbin/sshd", "ps -eo")
        lines = self.run(name, "ps -eo args= --no-headers").stdout.splitlines()
        return [line for line in lines if not line.startswith(own)]

    def _at_the_bridge(self, script: str) -> None:
        command = ["nsenter", "-t", str(self.process), "--net", "--mount", "--pid"]
        subprocess.run([*command, "sh", "-c", script], check=True)

    def _spawn(self, command: list[str], name: str) -> int:
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                command,
                env={"PATH": ENVIRONMENT["PATH"]},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            ).pid


def _enter(process: int) -> list[str]:
    spaces = ["--mount", "--uts", "--ipc", "--net", "--pid"]
    return ["nsenter", "-t", str(process), *spaces]


def _apart(place: Path) -> bool:
    """Whether `place` is not visible on a host: outside of the root file system, or in /tmp."""
    return place.stat().st_dev != Path("/").stat().st_dev or place.is_relative_to("/tmp")


def _child(process: int) -> int:
    children = Path(f"/proc/{process}/task/{process}/children")
    _wait(lambda: bool(children.read_text().split()), f"a child of process {process}")
    return int(children.read_text().split()[0])


def _ended(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def _wait(condition: Callable[[], bool], what: str, limit_s: float = 60) -> None:
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            if condition():
                return
        time.sleep(0.02)
    raise TimeoutError(f"{what}: not within {limit_s} s")
