"""Probes: seconds of the ordinary training loop, measured; and scaling studies made of them.

May import the rooms of `trainers` above it (root, data, checkpoints, engine, tracking, planning,
runs) and `cluster`. Begin reading with `probe.probe_pool`; `timing.py` is the worker's side.
"""
