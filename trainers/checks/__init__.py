"""What is looked at before a state changes, or leaves the process.

May import the modules at the root of `trainers`. Begin with `returned_values.py`, the values that a
workload's methods return; `finite.py` has numbers that are not finite, and `modes.py` keeps each
module in training or in evaluation mode, as it was built.
"""
