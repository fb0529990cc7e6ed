"""An engine that computes nothing: the timing and the KV cache of a real one, and faults on request.

options.py      what a profile may set
engine.py       the contract: start, submit, the step loop, faults carried out
scheduler.py    continuous batching over the block pool, without clock or loop
cache.py        the block pool: reference counts, prefix reuse, LRU eviction
timing.py       how long a step takes
tokens.py       which tokens come out
faults.py       the language of faults
"""
