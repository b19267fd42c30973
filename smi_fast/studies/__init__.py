"""The comparisons of the paper, written as pages."""
