"""The evidence of docs/peeking.md: each module is a program, run as ``python -m``."""
