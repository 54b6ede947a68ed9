"""The verb `session`."""

import argparse
from typing import TYPE_CHECKING

from cluster.cli.options import Subparsers

if TYPE_CHECKING:
    from cluster.session.session import Session


def add_verbs(verbs: Subparsers) -> None:
    session = verbs.add_parser(
        "session",
        help="show the processes that stay warm on this machine, or end them",
        description="Show the sessions of this user: processes that have torch and Ray imported, "
        "and a Ray, which make the next command start quickly. They end by themselves when they "
        "have been idle for session.keep_warm_s of the last spec.",
    )
    session.add_argument("--end", action="store_true", help="end those that no command uses")
    session.set_defaults(command=session_command)


def session_command(args: argparse.Namespace) -> int:
    from cluster.session.session import all_sessions

    sessions = all_sessions()
    if not sessions:
        print("no session runs on this machine")
    busy = 0
    for session in sessions:
        try:
            if not args.end:
                print(_describe(session))
            elif session.end():
                print(f"session {session.name}: ended")
            else:
                print(f"session {session.name}: a command is using it")
                busy += 1
        except (OSError, ValueError):  # it ended before it answered
            print(f"session {session.name}: ending")
    return 2 if busy else 0


def _describe(session: "Session") -> str:
    from cluster.session.session_memory import memory_bytes

    status = session.status()
    state = "in use" if status["in_use"] else f"idle, ends in {status['ends_in_s']:.0f} s"
    memory_mb = memory_bytes(status["pid"]) / 1e6
    return (
        f"session {session.name}: {state}; {memory_mb:,.0f} MB; Ray at {status['ray'] or 'none'}; "
        f"process {status['pid']}, log {session.folder / 'log'}"
    )
