"""One training run, from its spec to its end, under Ray Train.

May import the rooms of `trainers` above it (root, data, checkpoints, engine, tracking, planning)
and `cluster`. Begin reading with `run.py` (what a run is), then `execution.run_to_end` and
`ray_train.run_workers`. Everything private to Ray Train is in `ray_train_internals.py`.
"""
