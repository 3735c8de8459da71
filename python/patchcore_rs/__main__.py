"""`python -m patchcore_rs` is the command `patchcore-rs`."""

from __future__ import annotations

from patchcore_rs.cli.main import main

if __name__ == "__main__":
    main()
