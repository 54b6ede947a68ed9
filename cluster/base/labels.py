"""Ray node labels that say what kind of machine a node is, and what it costs."""

PROVIDER = "heliostat.io/provider"
INSTANCE = "heliostat.io/instance"
REGION = "heliostat.io/region"
MARKET = "heliostat.io/market"
"""Its value is SPOT or ON_DEMAND."""
USD_PER_HOUR = "heliostat.io/usd-per-hour"
FALLBACK_FOR = "heliostat.io/fallback-for"
"""On an on-demand node type: the spot type that `cluster.node.spot_fallback` replaces by it."""

SPOT = "spot"
ON_DEMAND = "on-demand"
