"""The model that a worker trains: built from a workload, spread over the workers, updated.

May import the modules at the root of `trainers`; knows neither the training loop nor data sets.
Begin with `build.py`, which takes a workload to a model that is ready for its first step. How it
is spread over the workers is in `strategy.py`, the update of its weights in `weight_update.py`.
"""
