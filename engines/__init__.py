"""Inference engines behind one contract. Imports only the standard library and msgspec until an engine starts."""
