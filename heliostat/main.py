"""The entry of the command `heliostat`: it checks our packages, runs a verb and reports errors.

It imports only the standard library until it knows that `cluster` and `trainers` are our own.
"""

import importlib.util
import os
import sys
from pathlib import Path

PACKAGES = ("cluster", "trainers", "tuning", "heliostat")
HOME = Path(__file__).resolve().parent.parent


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 2 for a user's mistake, 130 after Ctrl-C.

    The command itself runs its verb in a process that the session forks, where that is quicker; a
    program that calls this with `arguments` runs it in its own process.

    An error that the user can mend is printed in one line; any other error is a traceback.
    """
    problem = find_shadowed_package(Path.cwd())
    if problem is not None:
        print(problem, file=sys.stderr)
        return 2
    if arguments is None:
        return run(sys.argv[1:], in_session=True)
    return run(arguments)


def run(arguments: list[str], in_session: bool = False) -> int:
    """Run a verb in this process or, with `in_session`, in one that the session forks."""
    from cluster.base.errors import HeliostatError
    from tuning.cli.parser import build_parser

    try:
        args = build_parser().parse_args(arguments)
        modules = getattr(args, "session_modules", None)
        if in_session and modules is not None:  # a verb that trains
            from cluster.session.session import run_in_session

            needs_ray = not (args.address or os.environ.get("RAY_ADDRESS"))
            code = run_in_session("heliostat.main:run", arguments, modules, needs_ray)
            if code is not None:
                return code
        return int(args.command(args))
    except HeliostatError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def find_shadowed_package(folder: Path) -> str | None:
    """One line if another distribution, or the working `folder`, hides one of our packages.

    Their names are common words, and another package's `cluster` would fail later and obscurely.
    A folder `heliostat` without `__init__.py` is allowed: it is the usual name of a checkout.
    """
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        places = (spec.submodule_search_locations or [spec.origin or ""]) if spec else []
        if HOME / name not in [Path(place).resolve() for place in places]:
            found = ", ".join(places) or "nowhere"
            return (
                f"the package {name!r} that Python finds is not Heliostat's but {found}; "
                "uninstall the other distribution or use a virtual environment of its own"
            )
        package = folder / name / "__init__.py" if name == "heliostat" else folder / name
        for other in (package, folder / f"{name}.py"):
            if other.exists() and HOME not in other.resolve().parents:
                return f"{other}: hides Heliostat's own package {name!r}; rename it"
    return None
