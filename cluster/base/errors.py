"""Errors that the command line shows as one message, without a traceback."""


class HeliostatError(Exception):
    """Base of the errors whose message the command line prints as it is."""

    exit_code = 1


class SpecError(HeliostatError):
    """A user's mistake in a spec: one line `dotted.path: problem (got ...)` per mistake."""

    exit_code = 2


class DataError(HeliostatError):
    """A problem in the user's data; the message names the file."""

    exit_code = 2


class ClusterError(HeliostatError):
    """The cluster cannot be reached."""


class CheckpointError(HeliostatError):
    """A checkpoint cannot be used; the message names it and the reason."""


class TrainingError(HeliostatError):
    """Training failed for a reason that a retry would not change."""

    traceback = ""
    """The traceback of the exception of the user's code that ended it, for the log."""
