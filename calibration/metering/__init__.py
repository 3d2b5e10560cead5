"""Meters a GPU: the energy counter, its windows, what else is on the board."""
