"""Who serves what: one file a worker in the run dir. Needs only msgspec and the standard library (`watch` apart)."""
