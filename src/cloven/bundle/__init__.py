"""Bundles on disk: manifests, shards and their verification; no secret logic."""
