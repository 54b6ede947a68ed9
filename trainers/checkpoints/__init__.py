"""A run's state to disk and back, complete or absent, and exported models.

May import the modules at the root of `trainers` and the room `modeling`. Begin with
`checkpoints.py`; `state.py` turns a model and an optimizer into named tensors, `shards.py` and, for
several workers, `distributed.py` write them, one file per worker, and `manifest.py` checks the
files. `export.py` is the trained model on its own, for users, `user_code.py` what it needs of their
own code.
"""
