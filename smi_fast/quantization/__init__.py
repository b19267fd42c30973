"""Quantisation of trained ViTs, calibrated on inverted images."""
