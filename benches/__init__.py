"""How long patchcore-rs takes beside its rivals; README.md says how to run it."""
