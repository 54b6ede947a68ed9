"""The verbs of the command line that concern clusters and jobs: arguments and printed output.

Each file has an `add_verbs`, and imports what a verb needs inside the verb, so that `--help`
stays instant. May import every other room of `cluster`. Begin with `jobs`.
"""
