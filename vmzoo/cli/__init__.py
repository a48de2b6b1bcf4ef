"""The `vmzoo` command: thin layers over the library, one module a subcommand."""
