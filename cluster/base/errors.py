"""What can go wrong in ways that the user is told in a line, without a traceback."""


class HeliostatError(Exception):
    """Base of the errors that the command line prints as they are."""

    exit_code = 1


class SpecError(HeliostatError):
    """A mistake of the user's, as lines of `dotted.path: what is wrong (got ...)`."""

    exit_code = 2


class DataError(HeliostatError):
    """Something is wrong with the user's data; the message names the file."""

    exit_code = 2


class ClusterError(HeliostatError):
    """The cluster cannot be reached."""


class CheckpointError(HeliostatError):
    """A checkpoint that cannot be used; the message names it and says why."""


class TrainingError(HeliostatError):
    """Training cannot go on, for a reason that trying again would not change."""
