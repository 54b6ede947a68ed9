"""Natural and programming language with a GPT."""

from trainers.workloads import names_of_workload

__getattr__ = names_of_workload(__name__)
