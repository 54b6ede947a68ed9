"""What a node costs: whose price counts, how old it is, and what its electricity emits."""

import datetime
from pathlib import Path

import pytest

from cluster.base.errors import SpecError
from cluster.cost.carbon import carbon_of
from cluster.cost.catalog import find_instance, instances
from cluster.cost.live_prices import refreshed
from cluster.cost.node_rates import CostSpec, quote, rate_of
from cluster.cost.user_prices import Own, overridden, read_own

TODAY = datetime.date(2026, 11, 22)
P5 = {
    "heliostat.io/provider": "aws",
    "heliostat.io/instance": "p5.48xlarge",
    "heliostat.io/region": "us-east-1",
    "heliostat.io/market": "spot",
}

OWN = """
instances:
  aws/p5.48xlarge: {discount: 0.25}
  aws/us-east-1/g5.xlarge: {usd_per_h: 0.70}
machines:
  lab:
    hosts: [lab-*]
    vcpus: 64
    memory_gib: 512
    bought_usd: 35064
    life_years: 4
    use: 0.5
    power_w: 1500
    usd_per_kwh: 0.20
    g_co2e_per_kwh: 50
    pue: 1.2
"""


@pytest.fixture
def own(tmp_path: Path) -> Own:
    path = tmp_path / "prices.yaml"
    path.write_text(OWN)
    return read_own(path)


def test_every_dollar_has_its_age_and_source() -> None:
    rate = rate_of("ip-10-0-0-1", P5, CostSpec(), Own(), today=TODAY)
    assert rate.usd_per_h == 16.8795
    assert rate.price.startswith("aws/us-east-1/p5.48xlarge spot: $16.88/h (aws/karpenter")
    assert rate.price.endswith("of 2026-07-20, 125 days old)")
    undated = find_instance("lambda", "gpu_8x_h100_sxm5")
    assert undated is not None
    assert quote(undated, False, TODAY).endswith("of unknown age)")
    assert "price unknown" in quote(undated, True, TODAY)


def test_a_price_of_another_region_says_so() -> None:
    rate = rate_of("a", {**P5, "heliostat.io/region": "eu-west-1"}, CostSpec(), Own(), today=TODAY)
    assert rate.usd_per_h == 16.8795
    assert rate.price.endswith(", taken for eu-west-1")


def test_whose_price_counts(own: Own) -> None:
    """The spec's own figure before the node's label, before the user's file, before the list."""
    machine = rate_of("lab-7", P5, CostSpec(), own, today=TODAY)
    assert machine.usd_per_h == pytest.approx(2.0 + 1.5 * 1.2 * 0.2)
    assert machine.price.startswith("lab: $")
    assert rate_of("cloud", P5, CostSpec(), own).usd_per_h == pytest.approx(16.8795 * 0.75)
    rendered = {"heliostat.io/instance": "p5.48xlarge", "heliostat.io/usd-per-hour": "55.04"}
    assert rate_of("cloud", rendered, CostSpec(), own).usd_per_h == pytest.approx(55.04 * 0.75)
    labelled = {**P5, "heliostat.io/usd-per-hour": "3.5"}
    assert rate_of("lab-7", labelled, CostSpec(), own).usd_per_h == 3.5
    assert rate_of("lab-7", labelled, CostSpec(usd_per_h=1), own).usd_per_h == 1
    g5 = {**P5, "heliostat.io/instance": "g5.xlarge", "heliostat.io/market": "on-demand"}
    found = rate_of("cloud", g5, CostSpec(), own)
    assert (found.usd_per_h, "your price file" in found.price) == (0.70, True)
    names = [each.key for each in overridden(own, instances())]
    assert names[-1] == "own//lab"


def test_an_unknown_price_is_none_and_says_why() -> None:
    rate = rate_of("laptop", {}, CostSpec(), Own())
    assert rate.usd_per_h is None
    assert rate.price == "price of laptop unknown: no label, no row in your price file"
    other = rate_of("x", {**P5, "heliostat.io/instance": "p9.huge"}, CostSpec(), Own())
    assert (other.usd_per_h, other.price) == (
        None,
        "price of p9.huge unknown: not in the price list",
    )
    with pytest.raises(SpecError, match="usd-per-hour must be a number"):
        rate_of("x", {"heliostat.io/usd-per-hour": "cheap"}, CostSpec(), Own())


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("instances: {aws/p5.48xlarg: {discount: 0.1}}", "did you mean 'aws/p5.48xlarge'"),
        ("instances: {aws/p5.48xlarge: {usd_per_h: -1}}", "greater than 0 (got -1)"),
        ("instances: {aws/p5.48xlarge: {}}", "must have either prices or a discount"),
        ("machines: {lab: {hosts: [a], price: 1}}", "machines.lab.price: unknown key"),
    ],
)
def test_a_mistake_in_the_users_file_names_file_and_row(
    tmp_path: Path, text: str, problem: str
) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text(text)
    with pytest.raises(SpecError) as caught:
        read_own(path)
    assert all(line.startswith(f"{path}: ") for line in str(caught.value).splitlines())
    assert problem in str(caught.value)


def test_carbon_is_that_of_the_place_and_never_guessed() -> None:
    virginia = carbon_of("aws", "us-east-1")
    assert virginia is not None
    # eGRID2023's Virginia: 539.599 lb/MWh.
    assert virginia.g_co2e_per_kwh == pytest.approx(539.599 * 0.45359237, abs=0.05)
    assert (virginia.place, virginia.year) == ("US-VA", 2023)
    assert carbon_of("aws", "eu-north-1").g_co2e_per_kwh < 50  # type: ignore[union-attr]
    assert carbon_of("aws", "xx-west-9") is None
    rate = rate_of("a", P5, CostSpec(), Own())
    assert rate.kg_co2e(3.6e6) == pytest.approx(0.2448 * 1.14)
    nowhere = rate_of("laptop", {}, CostSpec(), Own())
    assert nowhere.kg_co2e(3.6e6) is None
    given = rate_of("laptop", {}, CostSpec(g_co2e_per_kwh=100, pue=1.5), Own())
    assert given.kg_co2e(3.6e6) == pytest.approx(0.15)


def test_todays_prices_by_gpuhunt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real library, on a folder of its own price lists."""
    pytest.importorskip("gpuhunt", reason="heliostat[prices] is not installed")
    header = "instance_name,location,price,cpu,memory,gpu_count,gpu_name,gpu_memory,spot,disk_size"
    rows = [
        "p5.48xlarge,us-east-1,50.0,192,2048,8,H100,80,False,",
        "p5.48xlarge,us-east-1a,12.0,192,2048,8,H100,80,True,",
        "p5.48xlarge,us-west-2,1.0,192,2048,8,H100,80,False,",
    ]
    (tmp_path / "aws.csv").write_text("\n".join([header, *rows]))
    monkeypatch.setenv("GPUHUNT_CATALOG_DIR", str(tmp_path))
    known, problem = refreshed(instances(), ("aws",), TODAY)
    assert problem is None
    rate = rate_of("a", P5, CostSpec(), Own(), known, TODAY)
    assert rate.usd_per_h == 12.0
    assert "gpuhunt" in rate.price
    untouched = next(each for each in known if each.name == "g5.xlarge")
    assert untouched == find_instance("aws", "g5.xlarge")
    (tmp_path / "aws.csv").unlink()
    again, problem = refreshed(instances(), ("aws",), TODAY)
    assert again == instances()
    assert problem is not None
    assert problem.startswith("gpuhunt: ")


def test_without_gpuhunt_the_snapshot_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gpuhunt", None)
    assert refreshed(instances()) == (instances(), "gpuhunt is not installed")
