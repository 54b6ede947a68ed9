"""Molecular dynamics: energies and forces of atoms."""

from trainers.workloads import names_of_workload

__getattr__ = names_of_workload(__name__)
