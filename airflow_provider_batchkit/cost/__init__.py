"""Prices, the bill, what requests will cost and may cost at most, and budgets."""
