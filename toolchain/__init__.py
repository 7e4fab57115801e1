"""Exports, optimises, validates, compares and ships fine-tuned text classifiers as ONNX models."""

import os

# ONNX Runtime reports its use to Microsoft by default. It reads this variable once, when it is imported; a user may set
# another value.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
