"""Virtual memory of a device: reserve addresses, import memory by descriptor, map it there."""
