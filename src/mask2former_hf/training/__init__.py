"""From annotated images to a measured checkpoint."""
