"""The enclave's arithmetic for a few rows, in C++; optional."""
