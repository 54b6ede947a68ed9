"""Data sets and checkpoints on storage that all machines share, a server that speaks S3."""

import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from cluster.base.errors import SpecError
from cluster.base.files import cache_folder
from trainers.checkpoints.checkpoints import Checkpoints
from trainers.data.dataset import prepare_dataset
from trainers.data.remote import local_dataset
from trainers.data.splits import count_samples, open_splits
from trainers.spec import CheckpointSpec, RunSpec, resolve

Wait = Callable[..., None]


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server that speaks S3, with one bucket."""
    pytest.importorskip("moto.server", reason="moto's server is not installed")
    folder = tmp_path_factory.mktemp("s3")
    server = subprocess.Popen(
        [sys.executable, "-c", MOTO], stdout=subprocess.PIPE, stderr=(folder / "log").open("w")
    )
    assert server.stdout
    port = server.stdout.readline().decode().strip()
    assert port, (folder / "log").read_text()
    address = f"127.0.0.1:{port}"
    request = urllib.request.Request(f"http://{address}/bucket", method="PUT")
    urllib.request.urlopen(request, timeout=120).close()
    yield address
    server.kill()
    server.wait()


MOTO = """
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
server._thread.join()
"""


@pytest.fixture
def uri(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A URI of its own in the bucket; this machine has downloaded nothing yet."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    machine(monkeypatch, tmp_path / "first")
    return f"s3://bucket/{tmp_path.name}?scheme=http&endpoint_override={s3}&region=us-east-1"


def machine(monkeypatch: pytest.MonkeyPatch, temporary: Path) -> None:
    """Act as another machine, which has downloaded nothing yet."""
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    assert cache_folder().is_relative_to(temporary)


def test_a_data_set_is_made_once_and_downloaded_by_each_machine(
    own_folder: Path, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, workload = resolve({"workload": "spirals:Spirals", "datasets": uri}, RunSpec)
    made = prepare_dataset(workload, own_folder / "runs", spec.datasets)
    samples = open_splits(made)["train"]["point"].clone()
    assert count_samples(made, "train") == len(samples) == 280
    assert not (own_folder / "runs").exists()
    monkeypatch.setattr(type(workload), "dataset", None)  # nobody makes it again
    machine(monkeypatch, tmp_path / "second")
    fetched = local_dataset(made, spec)
    assert fetched.is_relative_to(tmp_path / "second")
    assert torch.equal(open_splits(fetched)["train"]["point"], samples)
    assert prepare_dataset(workload, own_folder / "runs", spec.datasets) == fetched


def test_a_data_set_whose_preparation_failed_is_made_again(
    own_folder: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, workload = resolve({"workload": "spirals:Spirals", "datasets": uri}, RunSpec)
    made = type(workload).dataset
    monkeypatch.setattr(type(workload), "dataset", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare_dataset(workload, own_folder, spec.datasets)
    monkeypatch.setattr(type(workload), "dataset", made)
    assert count_samples(prepare_dataset(workload, own_folder, spec.datasets), "val") == 60


def test_checkpoints_are_found_from_another_machine(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(network.parameters())
    run, spec = tmp_path / "storage" / "a" / "checkpoints", CheckpointSpec(uri=uri)
    saved = Checkpoints(run, spec)
    saved.save(5, network, optimizer, {"x": 1.0})
    saved.wait()
    machine(monkeypatch, tmp_path / "second")
    (run / "elsewhere.json").unlink()  # the folder went with the first machine
    other = torch.nn.Linear(3, 2)
    step, numbers = Checkpoints(run, spec).resume(other, torch.optim.AdamW(other.parameters()))
    assert (step, numbers) == (5, {"x": 1.0})
    assert torch.equal(other.weight, network.weight)


def test_a_uri_that_cannot_be_used_is_named(own_folder: Path) -> None:
    _, workload = resolve({"workload": "spirals:Spirals"}, RunSpec)
    with pytest.raises(SpecError, match=r"^datasets: nothing://bucket cannot be used"):
        prepare_dataset(workload, own_folder, "nothing://bucket")
