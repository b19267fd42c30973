"""Inverted images, of which only the kept patches are stored, and labelled images."""
