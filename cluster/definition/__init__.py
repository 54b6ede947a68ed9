"""From a cluster's spec to the files of each provider, and checks of such files.

May import: `cluster.base`, `cluster.cost`, and `cluster.connection.ray_internals`.
Begin with `spec.py`, what a user can say, and `launcher_file.py`, the file for `ray up`.
"""
