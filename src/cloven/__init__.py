"""cloven: run a large language model on hardware nobody has to trust."""
