"""The `dvi` command."""
