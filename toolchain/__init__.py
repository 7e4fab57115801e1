"""From a fine-tuned text classifier to validated, compared, shippable ONNX artifacts."""

__version__ = "0.1.0"
