"""The tests."""

import os

# Before anything imports PyTorch: both processes of a test share the cores, and spinning threads would take the other's.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
