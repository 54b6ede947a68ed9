"""A job's log on a terminal and elsewhere."""

import io

from cluster.base.terminal import PROGRESS_PREFIX
from cluster.jobs.log_follower import CLEAR_LINE, LogPrinter

LOG = (
    f"begun\n{PROGRESS_PREFIX}step 1\n{PROGRESS_PREFIX}step 2\nevaluated\n{PROGRESS_PREFIX}step 3\n"
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_lines_overwrite_one_another_on_a_terminal() -> None:
    terminal = Terminal()
    printer = LogPrinter(terminal)
    printer.write(LOG)
    printer.close()
    shown = (
        f"begun\n{CLEAR_LINE}step 1{CLEAR_LINE}step 2{CLEAR_LINE}evaluated\n{CLEAR_LINE}step 3\n"
    )
    assert terminal.getvalue() == shown


def test_elsewhere_they_are_left_out_however_the_log_is_split() -> None:
    for size in range(1, len(LOG)):
        file = io.StringIO()
        printer = LogPrinter(file)
        for start in range(0, len(LOG), size):
            printer.write(LOG[start : start + size])
        printer.close()
        assert file.getvalue() == "begun\nevaluated\n"


def test_an_unfinished_line_is_written_at_the_end() -> None:
    file = io.StringIO()
    printer = LogPrinter(file)
    printer.write("begun\nKill")
    printer.write("ed")
    printer.close()
    assert file.getvalue() == "begun\nKilled\n"
