"""The `m2f` command: one module for each subcommand, a thin face of a room of the library."""
