"""Every message between processes of the box, and their framing. Needs only msgspec and the standard library.

framing.py   length-prefixed frames, sockets by directory descriptor, `Channel` for asyncio, `BlockingChannel`
spec.py      what the supervisor hands each child at start
status.py    child <-> supervisor, over the inherited status socket
figures.py   what children report at most four times a second
request.py   frontend -> worker, and the router's event subscription, over the worker's socket
route.py     frontend -> router
gms.py       engine -> gms, and gms <-> supervisor; descriptors.py carries file descriptors with frames
residency.py where a model's weights are
control.py   CLI and TUI -> supervisor
"""

PROTOCOL_VERSION = 1
