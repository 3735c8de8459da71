"""What a model is on disk: its parameters, settings, calibration and file. Needs no torch."""
