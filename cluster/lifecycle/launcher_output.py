"""The output of Ray's launcher: the one line that says why it failed."""

import re

_ANSI_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_ERROR_WORD = re.compile(
    r"error|fail|denied|timed out|timeout|not found|no such|unable|cannot|could not|invalid|"
    r"exceed|insufficient|unauthorized|refused|unreachable|abort",
    re.IGNORECASE,
)
_EXCEPTION_LINE = re.compile(r"[\w.]*(Error|ERROR|Exception|Failure)\b: ")
_UNINFORMATIVE_LINE = re.compile(
    r'^File "|^raise |Failed to setup head node|SSH command failed|update-failed|Full traceback|'
    r"Exception details|commands failed|command_runner.py|Permanently added|ERR updater|"
    r"originates from a subprocess|subprocess-exited|did not run successfully|PANIC commands"
)


def error_line(output: str) -> str:
    """The line of a launcher's output that best says why it failed, at most 300 characters.

    It is the last line of an exception, else the last one with a word such as "failed", else
    the last one.
    """
    plain = [line.strip(" \t\r│╰─>") for line in _ANSI_ESCAPE.sub("", output).splitlines()]
    lines = [line for line in plain if line and not _UNINFORMATIVE_LINE.search(line)]
    exceptions = [line for line in lines if _EXCEPTION_LINE.match(line)]
    errors = [line for line in lines if _ERROR_WORD.search(line)]
    return (exceptions or errors or lines or ["ended without a message"])[-1][:300]
