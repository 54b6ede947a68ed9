"""The rack with an on-premises cluster for the tests of this folder."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(
    0, str(Path(__file__).parent)
)  # pytest imports each test by itself, without packages

from own_hosts import OwnHosts
from rack import obstacle

OBSTACLE = obstacle()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if OBSTACLE and Path(item.fspath).parent == Path(__file__).parent:
            item.add_marker(pytest.mark.skip(reason=f"no rack of hosts: {OBSTACLE}"))


@pytest.fixture(scope="module")
def own_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnHosts]:
    """A head, two workers and the machine of a user with their file; Ray is not started."""
    with OwnHosts(tmp_path_factory.mktemp("rack") / "rack") as lab:
        yield lab
