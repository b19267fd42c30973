"""Images: inverted ones, kept sparse, and labelled ones."""
