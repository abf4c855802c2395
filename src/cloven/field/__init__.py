"""Arithmetic in F_p, p = 2^31 − 1: residues, the fixed-point codec, exact products, randomness, verification."""
