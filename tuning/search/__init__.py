"""What Ray Tune asks for: the next trial's parameters, and which trials go on.

`searcher` gives each trial its parameters, by a study of `optuna_study` with one of `samplers`;
`schedulers` builds what decides about running trials: `stopping_scheduler`, with a rule of
`tuning.stopping`, or `pbt`. May import `trainers`, `cluster`, and of `tuning` `spaces`, `stopping`
and `trials`. Begin reading with `searcher.JournaledSearcher`.
"""
