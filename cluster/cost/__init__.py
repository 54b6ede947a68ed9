"""What machines cost, draw and emit, from price list to ledger, and budgets that limit it.

May import: `cluster.base`; no Ray.
Begin with `node_rates.py`, the price of a node. Then `billing.py` (who pays for which part of a
node) writes into `ledger.py`, and `budget.py` compares the ledger's totals with the limits.
"""
