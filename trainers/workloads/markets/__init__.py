"""Limit order books: the next move of the mid-price."""

from trainers.workloads import names_of_workload

__getattr__ = names_of_workload(__name__)
