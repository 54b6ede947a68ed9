"""What Ray starts as Python, and how it is told from what only a plain Python can do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.connection.ray_internals import FORKED_RAY_SETTINGS
from cluster.zygote import stub
from cluster.zygote.python_for_ray import forked_processes, python_for

names = st.text("ABC_", min_size=1, max_size=3)
environments = st.dictionaries(names, st.text("xyz", max_size=2))


@given(command=environments, base=environments, added=environments)
def test_a_worker_has_its_commands_environment_and_what_ray_added(
    command: dict[str, str], base: dict[str, str], added: dict[str, str]
) -> None:
    own = {**base, **added}  # Ray starts a worker in its own environment, with additions
    found = stub.command_environment(command, base, own)
    for name, value in found.items():
        changed = name in own and own[name] != base.get(name)
        assert value == (own[name] if changed else command[name])
    assert command.keys() <= found.keys()


def test_variables_that_are_read_once() -> None:
    read_once = {"OPENBLAS_NUM_THREADS": "2", "TORCH_LOGS": "all", "PYTHONHASHSEED": "1"}
    others = {"OMP_NUM_THREADS": "1", "PYTHONPATH": "/x", "HOME": "/home", "RAY_JOB_ID": "01"}
    assert stub.frozen({**read_once, **others}) == read_once


def test_ray_sees_the_script_as_its_python(tmp_path: Path) -> None:
    real = sys.executable
    (tmp_path / "python.path").write_text(real)
    with forked_processes(tmp_path, "some"):
        script = Path(sys.executable)
        assert script == python_for(tmp_path, "some")
        assert FORKED_RAY_SETTINGS.items() <= os.environ.items()
    assert sys.executable == real
    assert not FORKED_RAY_SETTINGS.keys() & os.environ.keys()
    # What is no program of Ray's runs in the real Python, with its options.
    code = "import sys; print(sys.executable, sys.argv[1:], sys.flags.dont_write_bytecode)"
    done = subprocess.run(
        [script, "-B", "-c", code, "a b"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{real} ['a b'] 1\n"


def test_a_program_of_ray_runs_as_usual_without_a_zygote(tmp_path: Path) -> None:
    program = tmp_path / "ray" / "log_monitor.py"
    program.parent.mkdir()
    program.write_text("import sys; print('runs', *sys.argv[1:]); sys.exit(4)")
    (tmp_path / "python.path").write_text(sys.executable)
    script = python_for(tmp_path, "some")
    done = subprocess.run([script, "-u", program, "x"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (4, "runs x\n")
    assert "does not answer" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    "context",
    [
        {"command_prefix": ["docker", "run"]},
        {"override_worker_entrypoint": "/x.py"},
        {"py_executable": "/another/python"},
    ],
)
def test_ray_sets_up_itself_what_is_more_than_variables_and_a_folder(
    context: dict[str, object],
) -> None:
    arguments = [f"--serialized-runtime-env-context={json.dumps(context)}", "worker.py"]
    assert stub._set_up_worker(arguments, "/python") is None


def test_a_workers_variables_and_folder_are_set_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("PLACE", "before")
    context = {
        "command_prefix": ["cd", str(tmp_path), "&&"],
        "env_vars": {"PLACE": "${HOME}/x"},
        "py_executable": "/python",
    }
    given = f"--serialized-runtime-env-context={json.dumps(context)}"
    arguments = [given, "--language=PYTHON", "-S", "worker.py", "--port=1"]
    assert stub._set_up_worker(arguments, "/python") == ["-S", "worker.py", "--port=1"]
    assert os.environ["PLACE"] == "/home/me/x"
    assert Path.cwd() == tmp_path
