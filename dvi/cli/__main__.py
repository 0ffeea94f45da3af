"""`python -m dvi.cli`, which older launch commands name, is `python -m dvi`."""

from dvi.__main__ import main

if __name__ == "__main__":
    main()
