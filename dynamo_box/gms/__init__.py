"""GPU Memory Service: one process a device owns the weight memory; engines map it.

`client` and `vmm` are imported by engines and need msgspec and the standard library only; the rest is the service.
"""
