"""Filters for machines, and the error when no machine matches."""

import pytest

from cluster.base.errors import SpecError
from cluster.cost.catalog import instances
from cluster.cost.machine_filters import select_machines


@pytest.mark.parametrize(
    "text",
    [
        "provider=aws",
        "provider=aws,gcp accelerators>=8 usd<60",
        "accelerator=T4 vcpus<=8",
        "name=g5.* region!=eu-*",
        "spot_usd<20 memory_gib>500",
    ],
)
def test_the_selected_machines_match_all_conditions(text: str) -> None:
    left = select_machines(text, instances())
    assert 0 < len(left) < len(instances())
    fields = {
        "provider=aws": lambda i: i.provider == "aws",
        "provider=aws,gcp accelerators>=8 usd<60": lambda i: (
            i.provider in ("aws", "gcp") and i.accelerators >= 8 and i.usd_per_h < 60
        ),
        "accelerator=T4 vcpus<=8": lambda i: i.accelerator == "T4" and i.vcpus <= 8,
        "name=g5.* region!=eu-*": lambda i: (
            i.name.startswith("g5.") and not i.region.startswith("eu-")
        ),
        "spot_usd<20 memory_gib>500": lambda i: (
            i.spot_usd_per_h is not None and i.spot_usd_per_h < 20 and i.memory_bytes > 500 * 2**30
        ),
    }
    assert left == [each for each in instances() if fields[text](each)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "needs conditions"),
        ("aws", "must look like provider=aws"),
        ("providor=aws", "did you mean 'provider'?"),
        ("usd=cheap", "usd is a number (got 'cheap')"),
        ("provider<aws", "provider is text"),
        ("provider=awz", "provider: aws, azure, gcp, lambda, nebius, runpod"),
        ("provider=lambda accelerator=T4", "no machine with provider=lambda matches; acc"),
        ("usd<0.001", "usd: 0."),
    ],
)
def test_an_error_names_the_values_that_would_match(text: str, said: str) -> None:
    with pytest.raises(SpecError) as error:
        select_machines(text, instances())
    assert said in str(error.value)
    assert "\n" not in str(error.value)
