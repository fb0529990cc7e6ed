"""KV cache beyond one engine: what a block is called. Needs only msgspec and the standard library."""
