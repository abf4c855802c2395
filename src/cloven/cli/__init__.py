"""The command line: thin shells around the Python API."""
