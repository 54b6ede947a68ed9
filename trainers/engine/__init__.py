"""The training loop in one process of a group; knows neither Ray nor MLflow.

May import the modules at the root of `trainers` and the rooms `data`, `checkpoints` and
`modeling`. Begin with `loop.py`, which reads top to bottom, and `step.py`, one optimizer step.
`reporter.py` is the interface to the outside, `coordination.py` what the workers decide together.
"""
