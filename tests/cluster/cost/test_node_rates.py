"""A node's price: precedence and age of prices, and the emissions of its electricity."""

import datetime
from pathlib import Path

import pytest

from cluster.base.errors import SpecError
from cluster.cost import live_prices
from cluster.cost.carbon import carbon_intensity
from cluster.cost.catalog import find_instance, instances
from cluster.cost.live_prices import with_live_prices
from cluster.cost.node_rates import CostSpec, node_rate, price_text
from cluster.cost.user_prices import UserPrices, apply_user_prices, read_user_prices

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
def own(tmp_path: Path) -> UserPrices:
    path = tmp_path / "prices.yaml"
    path.write_text(OWN)
    return read_user_prices(path)


def test_every_price_has_its_age_and_source() -> None:
    rate = node_rate("ip-10-0-0-1", P5, CostSpec(), UserPrices(), today=TODAY)
    assert rate.usd_per_h == 16.8795
    assert rate.price_source.startswith("aws/us-east-1/p5.48xlarge spot: $16.88/h (aws/karpenter")
    assert rate.price_source.endswith("of 2026-07-20, 125 days old)")
    undated = find_instance("lambda", "gpu_8x_h100_sxm5")
    assert undated is not None
    assert price_text(undated, False, TODAY).endswith("of unknown age)")
    assert "price unknown" in price_text(undated, True, TODAY)


def test_a_price_from_another_region_is_marked() -> None:
    rate = node_rate(
        "a", {**P5, "heliostat.io/region": "eu-west-1"}, CostSpec(), UserPrices(), today=TODAY
    )
    assert rate.usd_per_h == 16.8795
    assert rate.price_source.endswith(", taken for eu-west-1")


def test_precedence_of_prices(own: UserPrices) -> None:
    """First the spec's own figure, then the node's label, the user's file, and the list."""
    machine = node_rate("lab-7", P5, CostSpec(), own, today=TODAY)
    assert machine.usd_per_h == pytest.approx(2.0 + 1.5 * 1.2 * 0.2)
    assert machine.price_source.startswith("lab: $")
    assert node_rate("cloud", P5, CostSpec(), own).usd_per_h == pytest.approx(16.8795 * 0.75)
    rendered = {"heliostat.io/instance": "p5.48xlarge", "heliostat.io/usd-per-hour": "55.04"}
    assert node_rate("cloud", rendered, CostSpec(), own).usd_per_h == pytest.approx(55.04 * 0.75)
    labelled = {**P5, "heliostat.io/usd-per-hour": "3.5"}
    assert node_rate("lab-7", labelled, CostSpec(), own).usd_per_h == 3.5
    assert node_rate("lab-7", labelled, CostSpec(usd_per_h=1), own).usd_per_h == 1
    g5 = {**P5, "heliostat.io/instance": "g5.xlarge", "heliostat.io/market": "on-demand"}
    found = node_rate("cloud", g5, CostSpec(), own)
    assert (found.usd_per_h, "your price file" in found.price_source) == (0.70, True)
    names = [each.key for each in apply_user_prices(own, instances())]
    assert names[-1] == "own//lab"


def test_an_unknown_price_is_none_and_says_why() -> None:
    rate = node_rate("laptop", {}, CostSpec(), UserPrices())
    assert rate.usd_per_h is None
    assert rate.price_source == "price of laptop unknown: no label, no row in your price file"
    other = node_rate("x", {**P5, "heliostat.io/instance": "p9.huge"}, CostSpec(), UserPrices())
    assert (other.usd_per_h, other.price_source) == (
        None,
        "price of p9.huge unknown: not in the price list",
    )
    with pytest.raises(SpecError, match="usd-per-hour must be a number"):
        node_rate("x", {"heliostat.io/usd-per-hour": "cheap"}, CostSpec(), UserPrices())


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("instances: {aws/p5.48xlarg: {discount: 0.1}}", "did you mean 'aws/p5.48xlarge'"),
        ("instances: {aws/p5.48xlarge: {usd_per_h: -1}}", "greater than 0 (got -1)"),
        ("instances: {aws/p5.48xlarge: {}}", "must have either prices or a discount"),
        ("machines: {lab: {hosts: [a], price: 1}}", "machines.lab.price: unknown key"),
    ],
)
def test_a_mistake_in_the_users_file_names_file_and_path(
    tmp_path: Path, text: str, problem: str
) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text(text)
    with pytest.raises(SpecError) as caught:
        read_user_prices(path)
    assert all(line.startswith(f"{path}: ") for line in str(caught.value).splitlines())
    assert problem in str(caught.value)


def test_carbon_intensity_is_that_of_the_region_and_never_guessed() -> None:
    virginia = carbon_intensity("aws", "us-east-1")
    assert virginia is not None
    # eGRID2023's Virginia: 539.599 lb/MWh.
    assert virginia.g_co2e_per_kwh == pytest.approx(539.599 * 0.45359237, abs=0.05)
    assert (virginia.place, virginia.year) == ("US-VA", 2023)
    assert carbon_intensity("aws", "eu-north-1").g_co2e_per_kwh < 50  # type: ignore[union-attr]
    assert carbon_intensity("aws", "xx-west-9") is None
    rate = node_rate("a", P5, CostSpec(), UserPrices())
    assert rate.kg_co2e(3.6e6) == pytest.approx(0.2448 * 1.14)
    nowhere = node_rate("laptop", {}, CostSpec(), UserPrices())
    assert nowhere.kg_co2e(3.6e6) is None
    given = node_rate("laptop", {}, CostSpec(g_co2e_per_kwh=100, pue=1.5), UserPrices())
    assert given.kg_co2e(3.6e6) == pytest.approx(0.15)


def test_todays_prices_from_gpuhunt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real library, and a folder of price lists."""
    pytest.importorskip("gpuhunt", reason="heliostat[prices] is not installed")
    header = "instance_name,location,price,cpu,memory,gpu_count,gpu_name,gpu_memory,spot,disk_size"
    rows = [
        "p5.48xlarge,us-east-1,50.0,192,2048,8,H100,80,False,",
        "p5.48xlarge,us-east-1a,12.0,192,2048,8,H100,80,True,",
        "p5.48xlarge,us-west-2,1.0,192,2048,8,H100,80,False,",
    ]
    (tmp_path / "aws.csv").write_text("\n".join([header, *rows]))
    monkeypatch.setenv("GPUHUNT_CATALOG_DIR", str(tmp_path))
    known, problem = with_live_prices(instances(), ("aws",), TODAY)
    assert problem is None
    rate = node_rate("a", P5, CostSpec(), UserPrices(), known, TODAY)
    assert rate.usd_per_h == 12.0
    assert "gpuhunt" in rate.price_source
    untouched = next(each for each in known if each.name == "g5.xlarge")
    assert untouched == find_instance("aws", "g5.xlarge")
    (tmp_path / "aws.csv").unlink()
    again, problem = with_live_prices(instances(), ("aws",), TODAY)
    assert again == instances()
    assert problem is not None
    assert problem.startswith("gpuhunt: ")


def test_todays_price_is_of_the_same_region(monkeypatch: pytest.MonkeyPatch) -> None:
    """Azure's eastus2 begins with eastus, but is another region."""
    gpuhunt_prices = {
        ("azure", "Standard_NC4as_T4_v3", False): {"eastus": 0.6, "eastus2": 0.1},
        ("azure", "Standard_NC4as_T4_v3", True): {"eastus": 0.3, "eastus2": 0.05},
    }
    monkeypatch.setattr(live_prices, "_fetch_offers", lambda providers: gpuhunt_prices)
    monkeypatch.setattr(live_prices.importlib.metadata, "version", lambda name: "1.0")
    known = [each for each in instances() if each.key == "azure/eastus/Standard_NC4as_T4_v3"]
    (live,), problem = with_live_prices(known, ("azure",), TODAY)
    assert problem is None
    assert (live.usd_per_h, live.spot_usd_per_h, live.spot_min_usd_per_h) == (0.6, 0.3, 0.3)


def test_without_gpuhunt_the_snapshot_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gpuhunt", None)
    assert with_live_prices(instances()) == (instances(), "gpuhunt is not installed")
