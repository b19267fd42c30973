"""Transfer of what a teacher knows to a student, on inverted images."""
