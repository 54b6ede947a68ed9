"""Arithmetic on probes: step times, forecasts with intervals, costs and plans. Starts nothing.

May import the root of `trainers` and `cluster.base` and `cluster.cost`. Begin reading with
`plan.plan`; below it are `forecast.py`, `machines.py`, `pools.py` and `step_time.py`.
"""
