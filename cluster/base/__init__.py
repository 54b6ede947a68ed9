"""Shared ground of all packages: specs as data, errors, files, the terminal, Ray's node labels.

May import: nothing of ours, and no Ray.
Begin with `config.py`: a spec from its YAML file to a frozen model, with errors that name the path.
"""
