"""Processes: workers started from Python."""
