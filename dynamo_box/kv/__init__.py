"""KV cache beyond one engine.

    hashing.py   what a block is called
    offload.py   which of a request's blocks go to the tiers: the priority filter, pure
    onboard.py   whether to load what was found or to compute it: pure
    client/      a worker's side of the tiers
    store/       the process that owns them: metadata of the host tier, files of the disk tier

All but `store` need only msgspec and the standard library, since engines' venvs import them.
"""
