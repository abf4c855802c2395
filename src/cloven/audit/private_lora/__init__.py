"""Attacks on private LoRA: one file each, with the adversary, the method and the measure of success in its docstring.

Nothing is charged to the ledger: the attacks ask a copy of the server's arithmetic, as often as the budget allows or, where they say so,
without a budget.
"""
