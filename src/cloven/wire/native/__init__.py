"""The bell of a shared-memory lane: C++, optional."""
