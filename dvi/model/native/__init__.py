"""Kernels of our own for Llama-shaped layers on x86 CPUs, compiled on the machine that runs them."""
