"""A worker's side of the KV tiers. Needs only msgspec and the standard library.

tiers.py     what an engine uses: two threads, jobs in and results out; jobs.py has both
outbound.py  blocks of the pool into the host tier
inbound.py   what the tiers have, into blocks of the pool
lane.py      a thread with a connection that outlives the store
session.py   one connection: questions and answers
arena.py     the store's memory in this process
ledger.py    totals and rates
"""
