"""The native engine: Llama-family models on torch alone, with continuous batching and a prefix cache.

    engine.py      the contract's adapter: the event loop's side, and the compute thread
    requests.py    what it refuses at once: no torch
    runner.py      one step: schedule, forward, sample, account; owned by the compute thread
    scheduler.py   which tokens are computed next, admission and preemption: no torch
    sequence.py    one request while it lives
    blocks.py      KV blocks: reference counts, prefix cache, eviction, events: no torch
    config.py      config.json and the engine's options, checked: no torch
    weights.py     safetensors files mapped into memory
    tiering.py     the KV tiers as the compute thread sees them: no torch
    offloading.py  which blocks go there, and when: no torch
    onboarding.py  what is loaded from there before a prompt is computed: no torch
    legs.py        prompts computed here whose answers another worker goes on with: no torch
    model.py       the Llama forward pass over a flat batch
    kv_cache.py    the memory of the blocks, and copies of them
    attention.py   attention through it
    rope.py        rotary position embedding
    sampler.py     logits to tokens

torch takes longer to import than everything else here together, so only the compute thread imports what needs
it: the worker answers on its sockets meanwhile.
"""
