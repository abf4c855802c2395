"""SLIP (arXiv 2407.10886): the secret low-rank part stays in the trusted process, the worker multiplies by the rest, masked."""
