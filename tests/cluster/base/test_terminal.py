"""During a run, the terminal shows our output, and a log gets the output of everybody else.

File descriptors 1 and 2 belong to the whole process, so each test has a process of its own.
"""

import subprocess
import sys
from pathlib import Path

EVERYBODY = """
import os, subprocess, sys
from pathlib import Path
from cluster.base.terminal import redirect_output

def everybody(word):
    print(word, "print")
    print(word, "print-err", file=sys.stderr)
    os.write(1, f"{word} write\\n".encode())
    os.write(2, f"{word} write-err\\n".encode())
    subprocess.run(["sh", "-c", f"echo {word} child; echo {word} child-err >&2"], check=True)

log = Path("log")
"""


def run(folder: Path, code: str) -> tuple[list[str], list[str], list[str]]:
    """The sorted lines of standard output, standard error and the log."""
    done = subprocess.run(
        [sys.executable, "-c", EVERYBODY + code], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    log = folder / "log"
    texts = (done.stdout, done.stderr, log.read_text() if log.exists() else "")
    out, err, logged = (sorted(text.splitlines()) for text in texts)
    return out, err, logged


def said(word: str, suffix: str) -> list[str]:
    return [f"{word} {who}{suffix}" for who in ("child", "print", "write")]


def test_all_output_but_the_consoles_goes_to_the_log(tmp_path: Path) -> None:
    out, err, log = run(
        tmp_path,
        """
everybody("before")
with redirect_output(log) as console:
    everybody("within")
    console.print("[bold]progress[/] 1/2")
everybody("after")
""",
    )
    assert out == sorted([*said("before", ""), *said("after", ""), "progress 1/2"])
    assert err == sorted([*said("before", "-err"), *said("after", "-err")])
    assert log == sorted([*said("within", ""), *said("within", "-err")])


def test_an_exception_restores_the_terminal(tmp_path: Path) -> None:
    out, err, log = run(
        tmp_path,
        """
open_before = os.listdir("/proc/self/fd")
try:
    with redirect_output(log) as console:
        sys.stdout.write("not yet flushed\\n")
        console.print("told before")
        raise RuntimeError
except RuntimeError:
    everybody("after")
assert os.listdir("/proc/self/fd") == open_before, "a descriptor was left open"
""",
    )
    assert out == sorted([*said("after", ""), "told before"])
    assert err == said("after", "-err")
    assert log == ["not yet flushed"]


def test_a_second_run_appends_to_the_log(tmp_path: Path) -> None:
    _, _, log = run(
        tmp_path,
        """
for word in ("first", "second"):
    with redirect_output(log):
        print(word)
""",
    )
    assert log == ["first", "second"]


def test_verbose_redirects_nothing(tmp_path: Path) -> None:
    out, err, log = run(
        tmp_path,
        """
with redirect_output(log, verbose=True) as console:
    everybody("within")
    console.print("progress")
""",
    )
    assert out == sorted([*said("within", ""), "progress"])
    assert err == said("within", "-err")
    assert log == []
    assert not (tmp_path / "log").exists()
