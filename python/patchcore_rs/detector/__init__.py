"""Detectors: what every one of them does, and PatchCore itself."""
