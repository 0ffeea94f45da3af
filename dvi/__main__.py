"""`python -m dvi` is `dvi`."""

from dvi.cli import main

main()
