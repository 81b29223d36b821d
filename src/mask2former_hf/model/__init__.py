"""Exactly what travels with a checkpoint. transformers copies these files beside it: they import only each other."""
