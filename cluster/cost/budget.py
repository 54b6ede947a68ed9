"""Budgets that stop a run: dollars, energy, carbon and time, over all its nodes and restarts."""

import re
from typing import Annotated, Any, NamedTuple

from pydantic import Field, field_validator

from cluster.base.config import Spec
from cluster.base.errors import SpecError
from cluster.cost.ledger import CostTotals
from cluster.cost.node_rates import NodeRate

Amount = Annotated[float, Field(gt=0)]

MAX_UNKNOWN_SHARE = 0.01
"""A budget of energy or carbon stops the run if a larger fraction of its time has no reading."""
UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


class BudgetSpec(Spec):
    """Limits on the total cost of the run; at a limit, the run is saved and stopped.

    A limit can be raised when the run is resumed. None means no limit.
    """

    usd: Amount | None = None
    """US dollars, for the nodes that the run holds, idle or not."""
    kwh: Amount | None = None
    """Kilowatt-hours of the metered devices, estimates included."""
    kg_co2e: Amount | None = None
    """Kilograms of CO2 equivalent of that energy, multiplied by the PUE."""
    wall: Amount | None = None
    """Running time of the commands: seconds, or text such as 90m, 1h30m or 2d."""

    @field_validator("wall", mode="before")
    @classmethod
    def _as_seconds(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        parts = re.findall(r"(\d+(?:\.\d+)?)\s*([smhd])\s*", value)
        if not parts or "".join(f"{n}{unit}" for n, unit in parts) != re.sub(r"\s", "", value):
            raise ValueError("must be seconds, or text such as 90m, 1h30m or 2d")
        return sum(float(number) * UNITS_S[unit] for number, unit in parts)


def duration_text(seconds: float) -> str:
    """A duration as text."""
    if seconds < 120:
        return f"{seconds:.4g} s"
    minutes, _ = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"


def usd_text(usd: float) -> str:
    """Dollars with cents; two significant digits below one dollar."""
    return f"${usd:,.2f}" if usd >= 1 or usd == 0 else f"${usd:.2g}"


class LimitUsage(NamedTuple):
    """How much of one limit of a budget is spent."""

    name: str
    spent: float
    limit: float
    text: str
    """Both amounts with their unit."""


def limit_usage(budget: BudgetSpec, totals: CostTotals) -> list[LimitUsage]:
    """The spent amount of each limit that is set."""
    figures = (
        ("usd", totals.usd, usd_text),
        ("kwh", totals.kwh, "{:.4g} kWh".format),
        ("kg_co2e", totals.kg_co2e, "{:.4g} kg CO2e".format),
        ("wall", totals.wall_s, duration_text),
    )
    found = []
    for name, used, text in figures:
        limit = getattr(budget, name)
        if limit is not None:
            amount = used or 0.0
            usage = LimitUsage(name, amount, limit, f"{text(amount)} of {text(limit)}")
            found.append(usage)
    return found


def reached_limit(budget: BudgetSpec, totals: CostTotals) -> str | None:
    """The first limit that is spent or cannot be kept, as one line; None if there is none."""
    for usage in limit_usage(budget, totals):
        if usage.spent >= usage.limit:
            return f"budget.{usage.name} reached: {usage.text}"
    return unenforceable_limit(budget, totals)


def unenforceable_limit(budget: BudgetSpec, totals: CostTotals) -> str | None:
    """Why a limit cannot be kept, as one line: its amount is unknown for a part of the run."""
    energy = totals.energy
    if budget.usd is not None and totals.unpriced_s:
        return f"budget.usd cannot be kept: {totals.unpriced_s:.0f} s of nodes have no price"
    for name in ("kwh", "kg_co2e"):
        if getattr(budget, name) is not None and energy.unknown_share > MAX_UNKNOWN_SHARE:
            share = f"{energy.unknown_share:.0%}"
            return f"budget.{name} cannot be kept: the energy of {share} of the time is unknown"
    if budget.kg_co2e is not None and totals.unknown_carbon:
        return "budget.kg_co2e cannot be kept: the carbon of a node's grid is unknown"
    return None


def check_budget(budget: BudgetSpec, totals: CostTotals, rates: dict[str, NodeRate]) -> None:
    """Refuse to start a run whose budget is spent already or cannot be measured.

    `rates` are those of the present nodes, by node name. Raises SpecError with one line.
    """
    for rate in rates.values():
        if budget.usd is not None and rate.usd_per_h is None:
            raise SpecError(f"budget.usd: {rate.price_source}; set cost.usd_per_h")
        if budget.kg_co2e is not None and rate.g_co2e_per_kwh is None:
            raise SpecError(f"budget.kg_co2e: {rate.carbon_source}; set cost.g_co2e_per_kwh")
    for name, spent, limit, text in limit_usage(budget, totals):
        if spent >= limit:
            raise SpecError(f"budget.{name}: {text} is spent; go on with --set budget.{name}=MORE")
