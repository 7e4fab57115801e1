"""Exporters, which convert a PyTorch model in memory to one ONNX file."""
