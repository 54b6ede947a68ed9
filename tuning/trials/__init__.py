"""The trials of a sweep: their parameters, their scheduler, their costs, and one trial's process.

`space` is the spec, `journal` the durable list of trials, `searcher` and `schedulers` are Ray
Tune's with ours around them, `budget` decides whether another trial is affordable, `trial` is the
trainable, and `leaderboard` reads the results. May import `trainers` and `cluster`, and of
`tuning` only `stopping`. Begin reading with `trial.run_trial`, then `searcher`.
"""
