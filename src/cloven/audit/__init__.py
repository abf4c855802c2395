"""The audit: attacks on a bundle of the user's own, each beside a system in which it succeeds."""
