"""The loop that turns noise into images of a class, and its parts."""
