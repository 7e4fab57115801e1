"""Exports, optimises, validates, compares and ships fine-tuned text classifiers as ONNX models."""

__version__ = "0.1.0"
