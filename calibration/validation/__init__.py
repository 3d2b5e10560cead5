"""Checks predictions against measurements, own and public, and reports the errors."""
