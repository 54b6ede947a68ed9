"""Protein folding: a backbone from a sequence and contact scores."""

from trainers.workloads import names_of_workload

__getattr__ = names_of_workload(__name__)
