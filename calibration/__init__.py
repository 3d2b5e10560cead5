"""Measures GPUs and fits the energy model (entered through `energymodel calibrate`, `fit`, ...)."""
