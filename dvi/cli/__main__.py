"""`python -m dvi.cli`, which older launch commands name, is `python -m dvi`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("dvi", run_name="__main__", alter_sys=True)
