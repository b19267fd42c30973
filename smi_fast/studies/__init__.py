"""The papers' comparisons, written as pages."""
