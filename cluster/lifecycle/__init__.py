"""From a cluster's file to a running cluster and back, around Ray's own launcher.

May import `base`, `connection` and `definition`. Begin with `launcher`: `up`, `down`
and `attach`.
"""
