"""Attacks on a stolen KV cache: one file each, with the adversary, the method and the measure of success in its docstring."""
