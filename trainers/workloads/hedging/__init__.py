"""Hedging: the price of an option and the shares to hold against it."""

from trainers.workloads import names_of_workload

__getattr__ = names_of_workload(__name__)
