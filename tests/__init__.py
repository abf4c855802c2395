"""The tests. Set here, before anything imports PyTorch: trusted process and worker share the cores, and spinning threads would take them."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
