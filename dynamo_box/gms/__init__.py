"""GPU Memory Service: one copy of a model's weights a device, shared by every process on it.

names.py  what the kernel is told the memory is
vmm/      allocate, reserve, map: one interface over the kinds of device memory
client/   what an engine uses; needs only msgspec and the standard library
"""
