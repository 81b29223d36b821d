"""The ground floor, which imports nothing of ours: the example, its readers and transforms, classes, run lengths."""
