"""Data sets, the catalogue and snapshots: what is on disk."""
