"""The router: which worker should take this request, and why.

index.py        which worker holds which KV blocks
load.py         what runs where: leases on load
predictions.py  what was routed a moment ago counts as cached already
cost.py         the decision, pure
decisions.py    the recent decisions and their hit rate
placement.py    all of that put together for the models of a box; no I/O
feed.py         one worker's dump and numbered events → index, in small slices
slices.py       long work on the event loop, a piece a turn
workers.py      connections to workers, as the instance directory names them
frontends.py    the listening side: connections from frontends and their leases
service.py      the router at work
process.py      its life under the supervisor
"""
