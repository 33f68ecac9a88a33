"""Writes models in the formats of other projects: diffusers' folders, ONNX, and `torch.export`."""
