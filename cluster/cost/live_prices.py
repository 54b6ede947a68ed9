"""Today's prices from gpuhunt (`heliostat[prices]`), where it is installed and can be reached.

gpuhunt downloads the price lists that dstack publishes, or reads the folder that
GPUHUNT_CATALOG_DIR names. Without gpuhunt or the network, the snapshot's prices stay, and callers
get the reason.
"""

import datetime
import importlib.metadata
import logging
import os
import threading
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from cluster.cost.catalog import Instance, is_in_region

TIMEOUT_S = 20.0
GPUHUNT_NAMES = {"lambda": "lambdalabs"}
"""Our name for a provider -> gpuhunt's, where they differ."""
PROVIDERS = ("aws", "gcp", "azure", "lambda", "nebius", "runpod")


def with_live_prices(
    known: Iterable[Instance],
    providers: Iterable[str] = PROVIDERS,
    today: datetime.date | None = None,
) -> tuple[tuple[Instance, ...], str | None]:
    """The instances at today's prices where known; and the reason if none are known.

    Blocks for at most `TIMEOUT_S`. Instances are matched by provider, name and region.
    """
    known = tuple(known)
    offers, problem = _fetch_within(TIMEOUT_S, tuple(providers))
    if problem:
        return known, problem
    day = today or datetime.date.today()
    source = f"gpuhunt {importlib.metadata.version('gpuhunt')}"
    return tuple(_with_live_price(each, offers, source, day) for each in known), None


def _with_live_price(
    instance: Instance,
    offers: dict[tuple[str, str, bool], dict[str, float]],
    source: str,
    day: datetime.date,
) -> Instance:
    """The instance at the prices of its region, which providers list by region or by zone."""

    def prices(spot: bool) -> list[float]:
        by_zone = offers.get((instance.provider, instance.name, spot), {})
        return sorted(usd for zone, usd in by_zone.items() if is_in_region(zone, instance.region))

    demand, spot = prices(False), prices(True)
    if not demand:
        return instance
    return replace(
        instance,
        usd_per_h=demand[0],
        spot_usd_per_h=spot[len(spot) // 2] if spot else None,
        spot_min_usd_per_h=spot[0] if spot else None,
        source=source,
        date=day,
    )


def _fetch_within(timeout_s: float, providers: tuple[str, ...]) -> tuple[Any, str | None]:
    """`_fetch_offers` with a timeout, which gpuhunt itself does not have; or why it failed."""
    found: list[Any] = []
    problem: list[str] = []

    def ask() -> None:
        try:
            found.append(_fetch_offers(providers))
        except ImportError:
            problem.append("gpuhunt is not installed")
        except Exception as error:  # whatever the network and its parsers raise
            problem.append(f"gpuhunt: {error}".splitlines()[0])

    thread = threading.Thread(target=ask, daemon=True, name="prices")
    thread.start()
    thread.join(timeout_s)
    if found:
        return found[0], None
    return {}, problem[0] if problem else f"no prices within {timeout_s:g} s"


def _fetch_offers(providers: tuple[str, ...]) -> dict[tuple[str, str, bool], dict[str, float]]:
    """(provider, name, spot) -> zone or region -> dollars per hour."""
    import gpuhunt

    logging.getLogger("gpuhunt").setLevel(logging.CRITICAL)  # it logs tracebacks when offline
    # With auto_reload it would ask the network first, even when it has a local folder.
    catalog = gpuhunt.Catalog(auto_reload="GPUHUNT_CATALOG_DIR" not in os.environ)
    offers: defaultdict[tuple[str, str, bool], dict[str, float]] = defaultdict(dict)
    for provider in providers:
        for item in catalog.query(provider=GPUHUNT_NAMES.get(provider, provider)):
            if item.price > 0:
                offers[provider, item.instance_name, item.spot][item.location] = item.price
    return offers
