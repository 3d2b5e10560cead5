"""Unit conversions. Everything inside the package is SI (J, s, W, B, FLOP)."""

JOULES_PER_KWH = 3.6e6
GIB = 2**30
PICO = 1e-12
TERA = 1e12

BYTES_PER_ELEMENT = {
    "fp32": 4.0,
    "bf16": 2.0,
    "fp16": 2.0,
    "fp8": 1.0,
    "int8": 1.0,
    "int4": 0.5 + 2.0 / 128,  # one 16-bit scale per group of 128 weights (GPTQ/AWQ layout)
    "mxfp4": 0.5 + 1.0 / 32,  # one 8-bit shared scale per block of 32 (OCP MX v1.0, section 5.2)
}
"""Stored bytes per element of each dtype, scales included."""
ACTIVATION_BYTES = 2.0
"""Bytes per element of activations: 16 bit on every stack modelled."""
