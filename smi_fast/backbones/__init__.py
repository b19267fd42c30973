"""What is inverted: models that give logits, and importance of patches, to the loop."""
