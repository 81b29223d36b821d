"""Images with annotations: generated scenes, later readers of the formats that people have."""
