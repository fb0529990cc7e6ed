"""The kvstore process: it owns the arenas of the host tier and the files of the disk tier, and deals in metadata."""
