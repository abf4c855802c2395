"""`python -m cloven`."""

from cloven.cli.main import run

run()
