"""The one place where demo, bench, audit and tests get models from."""
