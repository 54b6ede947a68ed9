"""What a sweep's spec says: what it varies, what it wants, and when it compares trials.

`space` is the spec, `distributions` the values of one parameter, `suggestion` the values of a trial
with their conditions and ties, `space_check` refuses what a trial could not use, `searches` and
`constraints` are fields of the spec, and `rungs` says when a scheduler decides. No Ray, no files.
May import `trainers`, `cluster.base` and `tuning.stopping`. Begin reading with `space.SweepSpec`.
"""
