"""What machines cost, how much energy they draw and CO2 they emit, and budgets that limit all three.

May import: `cluster.base`; no Ray.
Begin with `node_rates.py`, the price of a node. Then `billing.py` (who pays for which part of a
node) writes into `ledger.py`, and `budget.py` compares the ledger's totals with the limits.
"""
