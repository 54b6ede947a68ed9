"""The command `heliostat`: what is checked first, and what goes wrong told in a line.

Imports only the standard library until it knows that `cluster` and `trainers` are our own.
"""

import importlib.util
import sys
from pathlib import Path

PACKAGES = ("cluster", "trainers", "tuning", "heliostat")
HOME = Path(__file__).resolve().parent.parent


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code; 2 is a mistake of the user's, 130 an interruption.

    What the user can do something about is told in a line, everything else is a traceback.
    """
    stranger = find_stranger(Path.cwd())
    if stranger is not None:
        print(stranger, file=sys.stderr)
        return 2
    from cluster.base.errors import HeliostatError
    from tuning.cli.parser import build_parser

    try:
        args = build_parser().parse_args(arguments)
        return int(args.command(args))
    except HeliostatError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def find_stranger(folder: Path) -> str | None:
    """One line if another distribution, or the working `folder`, hides one of our packages.

    Their names are common words; a stranger's `cluster` would fail later and obscurely.
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
        for other in (folder / name, folder / f"{name}.py"):
            if other.exists() and other.resolve().parent != HOME:
                return f"{other}: hides Heliostat's own package {name!r}; rename it"
    return None
