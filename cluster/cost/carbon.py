"""Grams of CO2 equivalent per kWh where a provider's region is, and the overhead of its rooms.

`data/carbon.csv` has a row for each region: where it is (a country, a state of the USA) and the
yearly mean of the grid there. AWS and Azure publish no figures of their own, so where their
regions are is our own table. A region that is not in it has no figure: the world's mean would
be wrong by a factor of ten either way.
"""

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class CarbonIntensity:
    """What electricity is made of somewhere."""

    g_co2e_per_kwh: float
    place: str
    """Country (ISO 3166 alpha-3) or US state (US-VA)."""
    year: int | None
    source: str

    def __str__(self) -> str:
        when = f" {self.year}" if self.year else ""
        return f"{self.g_co2e_per_kwh:g} g CO2e/kWh in {self.place}{when} ({self.source})"


PUE: dict[str, tuple[float, str]] = {
    "aws": (1.14, "AWS, all its data centers in 2025: sustainability.aboutamazon.com"),
    "gcp": (1.10, "Google, its fleet: datacenterdynamics.com, December 2024"),
    "azure": (1.18, "Microsoft, all its regions: datacenterdynamics.com, December 2024"),
}
"""Provider -> power usage effectiveness as it publishes it, and where that was read."""


@cache
def _intensity_by_region() -> dict[tuple[str, str], CarbonIntensity]:
    with (Path(__file__).parent / "data" / "carbon.csv").open(newline="") as file:
        return {
            (row["provider"], row["region"]): CarbonIntensity(
                float(row["g_co2e_per_kwh"]),
                row["place"],
                int(row["year"]) if row["year"] else None,
                row["source"],
            )
            for row in csv.DictReader(file)
        }


def carbon_intensity(provider: str, region: str) -> CarbonIntensity | None:
    """The grid's figure where this region is; None when that is not known."""
    return _intensity_by_region().get((provider, region))
