"""An engine that computes nothing: the timing and the KV cache of a real one, and faults on request.

options.py      what a profile may set
engine.py       the contract: start, submit, the step loop, faults carried out
scheduler.py    continuous batching over the block pool, without clock or loop
sequence.py     one sequence, and a planned step
cache.py        the block pool: reference counts, prefix reuse, LRU eviction
legs.py         KV that leaves for another worker, and KV that arrives
handing.py      how it goes: over links, or through the KV tiers
tiering.py      the KV tiers: offloading.py what goes there, onboarding.py what comes from there
timing.py       how long a step and a hand-over take, and the figures of real GPUs
tokens.py       which tokens come out
faults.py       the language of faults
harm.py         what they do
"""
