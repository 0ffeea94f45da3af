"""The `dvi` command's first lines: signals are handled from here on, before anything takes long to import."""

from __future__ import annotations

from dvi.signals import handled


def main() -> None:
    """`dvi`, and `python -m dvi`."""
    with handled():
        from dvi.cli.main import main as command

        command()


if __name__ == "__main__":
    main()
