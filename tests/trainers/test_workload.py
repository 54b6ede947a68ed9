"""A workload is found by its short name, by `module:Class`, and by the names of older releases."""

import pytest

import trainers
from trainers.data.tables import table
from trainers.workload import SHIPPED_WORKLOADS, PartitionedWorkload, load_workload
from trainers.workloads.dynamics.workload import calculator


@pytest.mark.parametrize("name", SHIPPED_WORKLOADS)
def test_a_shipped_workload_is_found_where_it_was_before_it_had_a_package(name: str) -> None:
    """Spec files, exported models and run folders name it so."""
    workload = load_workload(name)
    assert load_workload(f"trainers.workloads.{name}:{workload.__name__}") is workload
    assert load_workload(f"{workload.__module__}:{workload.__name__}") is workload


def test_names_that_workloads_of_users_import() -> None:
    from trainers.data.tables import table as table_of_data
    from trainers.workloads import dynamics

    assert table_of_data is trainers.table is table
    assert trainers.PartedWorkload is trainers.PartitionedWorkload is PartitionedWorkload
    assert dynamics.calculator is calculator
    with pytest.raises(AttributeError, match=r"'trainers\.workloads\.dynamics' has no .*'nothing'"):
        _ = dynamics.nothing
