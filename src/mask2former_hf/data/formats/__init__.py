"""Segments in the formats of other tools: a file per format, and the writers of folders of them."""
