"""The trials of a sweep: their journal, their processes, their costs, and how they compare.

`journal` is the durable list of trials, `trial` one trial in a process, `budget` decides whether
another trial is affordable, `ranking` is the one rule by which trials are compared, `leaderboard`
reads the results, and `best_spec` writes the best trial as a spec file. May import `trainers` and
`cluster`, and of `tuning` `spaces` and `stopping`. Begin reading with `trial.run_trial`.
"""
