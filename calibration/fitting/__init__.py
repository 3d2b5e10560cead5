"""Fits calibrations: to kernel windows, to serving runs, to public tables; transfers them."""
