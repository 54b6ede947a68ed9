"""Everything of Ray's core that is used here and is not part of its public API.

Each item says why it is needed, and was read in Ray 2.60.0. For each of them
`tests/cluster/connection/test_ray_internals.py` has a test that fails, and says what to do, when
another release has changed it.

This module imports nothing of ours, and Ray only inside functions: the programs on the nodes and
the command line must start without it.
"""

import logging
from collections.abc import Mapping
from typing import Any


def prepare_launcher_file(config: Mapping[str, Any]) -> dict[str, Any]:
    """A file for `ray up` with the launcher's defaults filled in, which is what `ray up` runs.

    `ray.autoscaler.sdk.fillout_defaults` leaves out the common set-up commands and each type's
    number of workers, and `bootstrap_config` of the same module asks the cloud.
    """
    from ray.autoscaler._private.util import prepare_config

    logging.getLogger("ray.autoscaler._private.util").setLevel(logging.WARNING)
    return dict(prepare_config(dict(config)))


def validate_launcher_file(prepared: Mapping[str, Any]) -> None:
    """Check a prepared file against the launcher's schema and rules.

    Raises jsonschema's ValidationError, or ValueError or RuntimeError. Public functions validate
    only while they start a cluster.
    """
    from ray.autoscaler._private.util import validate_config

    validate_config(dict(prepared))
