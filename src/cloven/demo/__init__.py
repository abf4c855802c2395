"""The demonstration and the installation check."""
