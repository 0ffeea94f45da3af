"""Planning under a latency bound: profile the machine, simulate the server, search for the best plan.

After ExeGPT (Oh et al., ASPLOS 2024, arXiv 2404.07947). Below `dvi.serving.loop`, above the speculator.
"""
