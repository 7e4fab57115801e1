"""Shipping: bundles for apps, and how a bundle proves itself."""
