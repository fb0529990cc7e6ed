"""Inference engines behind one contract. Imports nothing but the standard library and msgspec until an engine starts."""
