"""Runs and sweeps as Ray jobs: package the code, start once, start again if lost, follow.

May import `base` and `connection`. Begin with `ray_jobs`, then `job` for what a job is.
"""
