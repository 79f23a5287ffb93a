"""Defaults that several commands share with experiment files."""

DECODE_SECONDS = 60.0
"""Time limit for decoding one video."""
