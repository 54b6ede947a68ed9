"""Names and arguments that are refused, and drivers that count as lost."""

from dataclasses import replace

import pytest

from cluster.base.errors import SpecError
from cluster.jobs.job import Job, Submission, check_submission, lost_reason

RUNNING = Job("a", 1, "RUNNING", ("train",), "gcs://p.zip", 0.0, None, "n1", None, None, "")
FAILED = replace(RUNNING, status="FAILED")


@pytest.mark.parametrize(
    ("job", "lost"),
    [
        (RUNNING, False),
        (replace(RUNNING, node_id="n0"), True),  # its node is gone
        (replace(RUNNING, node_id="n0", status="SUCCEEDED"), False),
        (replace(FAILED, exit_code=1), False),
        (replace(FAILED, exit_code=2), False),
        (replace(FAILED, exit_code=-9), True),
        (replace(FAILED, exit_code=137), True),
        (replace(FAILED, exit_code=-15), False),  # it was asked to end
        (replace(FAILED, exit_code=130), False),
        (replace(FAILED, error_type="JOB_SUPERVISOR_ACTOR_DIED"), True),
        (replace(FAILED, error_type="RUNTIME_ENV_SETUP_FAILURE"), False),
    ],
)
def test_which_drivers_are_lost(job: Job, lost: bool) -> None:
    assert (lost_reason(job, frozenset({"n1", "n2"})) is not None) == lost
    if job.status == "RUNNING":  # the living nodes are unknown
        assert lost_reason(job, frozenset()) is None


@pytest.mark.parametrize(
    ("submission", "line"),
    [
        (Submission("a b", ("train",)), "--name a b: must be letters"),
        (Submission("a~2", ("train",)), "--name a~2: must be"),
        (Submission("a", ("train", "x=http://me:secretword@h")), "x: a password in a URL"),
    ],
)
def test_bad_names_and_arguments_are_refused(submission: Submission, line: str) -> None:
    with pytest.raises(SpecError, match=line):
        check_submission(submission)
