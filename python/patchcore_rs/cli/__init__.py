"""The command `patchcore-rs`."""
