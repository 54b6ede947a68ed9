"""Many training runs under Ray Tune: a sweep from its spec to its end.

`sweep` runs one, `tuner` sets up Ray Tune for it, `progress` shows it in the terminal. The rooms:
`trials` (spec, search, budget, one trial), `fused` (many trials as one program), `reports`, `cli`.
This room may import `trials`, `fused`, and `trainers`; `reports` and `cli` may import it.
Begin reading with `sweep.run_to_end`.
"""
