"""The router: which worker should take this request, and why.

index.py        which worker holds which KV blocks
credit.py       what of a prompt a worker has, or could load from the box's tiers
load.py         what runs where: leases on load
predictions.py  what was routed a moment ago counts as cached already
cost.py         which of some workers, pure
legs.py         one leg or two, and a worker for each; pure
disagg.py       the policy for that as text, as it is set while the box runs
decisions.py    the recent decisions and their hit rate
pool.py         the workers of a model, as they come, go and change their roles
placement.py    all of that put together for the models of a box; no I/O
feed.py         one holder's dump and numbered events → index, in small slices
slices.py       long work on the event loop, a piece a turn
link.py         a connection that such a dump and events come over
workers.py      links to workers, as the instance directory names them
store.py        the link to the box's KV tiers
frontends.py    the listening side: connections from frontends and their leases
service.py      the router at work
process.py      its life under the supervisor
"""
