"""Checkpoints → ONNX, OpenVINO and PyTorch programs, checked against the checkpoint that they are made of."""
