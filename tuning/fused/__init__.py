"""Trains the trials of a sweep in slots of programs, and shows each to Ray Tune as a trial.

May import `tuning.programs`, `tuning.trials` and `trainers`. Begin with `fusion_plan.py` (whether
a sweep is fused), then `tune_adapter.py` (Tune's calls) and `engine.py` (the trials on one device).
What is private to Ray Tune is in `tune_internals.py`.
"""
