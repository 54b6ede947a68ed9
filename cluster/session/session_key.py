"""The folder of the session that this process belongs to: a digest of all that must be equal.

Imports only the standard library.
"""

import hashlib
import json
import os
import platform
import resource
import stat
import sys
import tempfile
from pathlib import Path

from cluster.base.files import user_folder
from cluster.zygote.handover import LIMITS, OF_COMMAND
from cluster.zygote.stub import frozen

HOME = Path(__file__).resolve().parents[2]
LONGEST_FOLDER = 43
"""Characters of a session's folder, below which Ray has sockets with paths of 64 characters more;
a Unix socket's path has at most 107."""
SESSION_ENV_VAR = "HELIOSTAT_SESSION"
"""`off` starts every process as usual, as where no session can be had."""


def session_folder() -> Path | None:
    """The folder of the session for this environment; None where there can be no session."""
    if os.environ.get(SESSION_ENV_VAR) == "off" or not hasattr(os, "pidfd_open"):
        return None
    if any(not _is_open(number) for number in (0, 1, 2)):
        return None
    place = sessions_folder()
    if place is None:
        return None
    folder = place / session_key()
    return folder if len(str(folder)) <= LONGEST_FOLDER else None


def session_key() -> str:
    """Eight hexadecimal digits for all that makes processes of one session interchangeable."""
    facts = {
        "python": [sys.executable, sys.prefix, platform.python_version(), list(sys.flags)],
        "packages": [(path, _modified_ns(path)) for path in sys.path if path.endswith("-packages")],
        "code": code_fingerprint(),
        "environment": {
            name: value for name, value in sorted(os.environ.items()) if _is_fixed(name)
        },
        "limits": [resource.getrlimit(getattr(resource, name)) for name in LIMITS],
        "cpus": sorted(os.sched_getaffinity(0)),
        "groups": sorted(os.getgroups()),
        "cgroup": Path("/proc/self/cgroup").read_text(),
        "namespaces": [
            str(Path("/proc/self/ns", name).readlink()) for name in ("mnt", "net", "pid")
        ],
    }
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]


def _is_fixed(name: str) -> bool:
    """Whether a variable must be the same in all processes of a session."""
    return (
        bool(frozen({name: ""}))
        or name in ("PYTHONPATH", "PATH", "HOME", "TMPDIR", "HELIOSTAT_CLUSTER")
        or name.endswith("_VISIBLE_DEVICES")
        or (name.startswith("RAY_") and not name.startswith(OF_COMMAND))
    )


def code_fingerprint() -> str:
    """A digest of the names, sizes and times of our source files."""
    digest = hashlib.sha256()
    for package in ("cluster", "trainers", "tuning", "heliostat"):
        for file in sorted((HOME / package).rglob("*.py")):
            found = file.stat()
            digest.update(f"{file} {found.st_size} {found.st_mtime_ns}".encode())
    return digest.hexdigest()


def sessions_folder() -> Path | None:
    """This user's folder for sessions; None if another user could reach into it."""
    try:
        place = user_folder(Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()))
        found = place.lstat()
    except OSError:
        return None
    if found.st_uid != os.getuid() or found.st_mode & 0o077 or not stat.S_ISDIR(found.st_mode):
        return None
    (place / "s").mkdir(mode=0o700, exist_ok=True)
    return place / "s"


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _modified_ns(path: str) -> int:
    try:
        return Path(path).stat().st_mtime_ns
    except OSError:
        return 0
