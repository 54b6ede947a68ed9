"""The verbs of training: their arguments, and what they print.

May import all of `trainers` but the workloads, and `cluster`. Since `--help` must not load torch,
Ray or MLflow, heavy modules are imported inside functions. Each verb has a module of its name;
begin reading with `train.py`.
"""
