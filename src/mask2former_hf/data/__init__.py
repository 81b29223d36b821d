"""The ground floor, which imports nothing of ours: readers, class tables, transforms, scenes, run-length codes."""
