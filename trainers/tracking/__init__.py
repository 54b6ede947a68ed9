"""Tracking: one writer to MLflow per run or sweep, behind an operation log on disk.

May import the root modules of `trainers`, `trainers.engine.reporter` and `cluster`. Begin with
`tracker.py`, the actor. Metrics come from `reporter.py`, go through `operation_log.py`, and are
sent by `sender.py` and `mlflow_store.py`, files by `file_sender.py`; `preflight.py` asks MLflow
before a run begins.
"""
