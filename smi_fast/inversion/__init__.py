"""The loop that turns noise into images of a class, and what it is made of."""
