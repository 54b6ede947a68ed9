"""Small models as users write them, each with the one habit that its docstring names.

A package of its own, not `tests....`, so that an exported model takes this folder along and no
more. The folder above is on `sys.path`, see `columns.py`.
"""

from wild_models.base import Wild


def all_models() -> dict[str, type[Wild]]:
    """Every workload by the first line of its docstring, in the order of the modules."""
    import wild_models.data
    import wild_models.dense
    import wild_models.images
    import wild_models.normalized
    import wild_models.outputs
    import wild_models.randomness
    import wild_models.sequences
    import wild_models.state

    modules = [
        wild_models.dense,
        wild_models.outputs,
        wild_models.normalized,
        wild_models.sequences,
        wild_models.images,
        wild_models.randomness,
        wild_models.state,
        wild_models.data,
    ]
    return {
        kind.__doc__.splitlines()[0]: kind
        for module in modules
        for kind in vars(module).values()
        if isinstance(kind, type) and kind.__module__ == module.__name__
        if issubclass(kind, Wild) and kind.__doc__
    }
