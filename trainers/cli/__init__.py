"""The verbs of training: their arguments, and what they print.

May import all of `trainers` and `cluster`, inside functions only, since `--help` must not load
torch, Ray or MLflow. Each verb has a module of its name; begin reading with `train.py`.
"""
