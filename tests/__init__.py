"""The tests."""

import os
import signal

# Before anything imports PyTorch: both processes of a test share the cores, and spinning threads would take the other's.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Where pytest-xdist runs several of us, each has one core: threads of one that wait for a core at a barrier would stop it for a time slice
# at every small product. Tests of many threads ask for them, and `make test-long` runs all tests in one process, with as many as there are.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# A job in the background of a shell's script ignores interruptions, and so would its children, which some tests interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
