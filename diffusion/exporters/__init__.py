"""Writes models in the formats of other projects: ONNX and `torch.export`."""
