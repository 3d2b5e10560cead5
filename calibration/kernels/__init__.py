"""Measures kernels: the suite as data, what launches it, the runner, its summary."""
