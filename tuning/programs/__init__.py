"""Many trials as one compiled program: K slots, one step that advances all of them.

Knows PyTorch and `trainers`; imports no Ray, and nothing of the sweep that the trials belong to.
Begin with `program.py` (trials in, steps, trials out), then `traced_step.py` (the step itself).
What is private to PyTorch is in `torch_internals.py`.
"""
