"""One thin module per command: compose, check, run."""
