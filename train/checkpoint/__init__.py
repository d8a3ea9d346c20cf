"""Checkpoints: a run's whole state on disk, and the checksums that tell whether it is damaged."""
