"""The native engine: Llama-family models on torch alone, with continuous batching and a prefix cache.

    engine.py      the contract's adapter: the event loop's side, and the compute thread
    runner.py      one step: schedule, forward, sample, account; owned by the compute thread
    scheduler.py   which tokens are computed next, admission and preemption: no torch
    sequence.py    one request while it lives
    blocks.py      KV blocks: reference counts, prefix cache, eviction, events: no torch
    config.py      config.json and the engine's options, checked: no torch
    weights.py     safetensors files mapped into memory
    model.py       the Llama forward pass over a flat batch
    attention.py   the paged KV cache, and attention through it
    rope.py        rotary position embedding
    sampler.py     logits to tokens

torch takes longer to import than everything else here together, so only the compute thread imports what needs
it: the worker answers on its sockets meanwhile.
"""
