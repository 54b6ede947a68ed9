"""Image recognition with a ResNet or a vision transformer."""

from trainers.workloads import names_of_workload

__getattr__ = names_of_workload(__name__)
