"""Carbon intensity of the grid in a provider's region, and the provider's PUE.

`data/carbon.csv` has a row for each region: its country or US state, and the yearly mean of the
grid there. AWS and Azure publish no figures, so the places of their regions are our own table. A
region that is not in the table has no figure: the world's mean could be wrong by a factor of ten in
either direction.
"""

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class CarbonIntensity:
    """Carbon intensity of a grid."""

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
"""Provider -> the power usage effectiveness that it publishes, and the source."""


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
    """Carbon intensity of the grid in this region; None when unknown."""
    return _intensity_by_region().get((provider, region))
