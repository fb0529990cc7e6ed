"""A worker's side of the KV tiers. Needs only msgspec and the standard library."""
