"""Which trials are the worse ones: rules of early stopping, and fronts of several objectives.

`rules` has asha and the median rule as functions of the evaluations that came in, `extrapolation`
the rule that forecasts learning curves, and `fronts` the non-dominated fronts. All of it is
arithmetic: no files, no Ray, nothing of a sweep. Imports no other room. Begin reading with
`rules.Asha`.
"""
