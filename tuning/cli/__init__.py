"""The verbs `sweep`, `report`, `schema` and `stop`, and the parser with the verbs of all packages.

Arguments and printed text, nothing else; Ray, torch and MLflow are imported only inside functions,
so that `--help` is instant. May import all rooms of `tuning`. Begin reading with `parser`.
"""
