"""The models that are inverted. They give logits and the importance of patches to the inversion loop."""
