"""Exporters: a PyTorch model in memory to one ONNX file."""
