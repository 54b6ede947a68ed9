"""The Ray labels by which a node says what it is and costs."""

PROVIDER = "heliostat.io/provider"
INSTANCE = "heliostat.io/instance"
REGION = "heliostat.io/region"
MARKET = "heliostat.io/market"
"""SPOT or ON_DEMAND."""
USD_PER_HOUR = "heliostat.io/usd-per-hour"
FALLBACK_FOR = "heliostat.io/fallback-for"
"""Of an on-demand type: the spot type in whose place `cluster.node.spot_fallback` puts it."""

SPOT = "spot"
ON_DEMAND = "on-demand"
