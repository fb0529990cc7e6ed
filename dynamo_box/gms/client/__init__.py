"""What an engine uses of weight memory. Needs msgspec and the standard library only, and no event loop.

weights.py  a model's weights: written once or mapped, let go, mapped again at the same addresses
session.py  one connection, call by call
watch.py    a connection that outlives the server
packing.py  where tensors lie in allocations
errors.py   what can go wrong
"""

from dynamo_box.gms.client.errors import (
    Asleep,
    GmsFailure,
    GmsRefused,
    LockTimeout,
    OutOfMemory,
    ServerGone,
    StaleLayout,
)
from dynamo_box.gms.client.packing import TensorSpec
from dynamo_box.gms.client.session import GmsSession
from dynamo_box.gms.client.weights import MappedTensor, Opened, Weights

__all__ = [
    "Asleep",
    "GmsFailure",
    "GmsRefused",
    "GmsSession",
    "LockTimeout",
    "MappedTensor",
    "Opened",
    "OutOfMemory",
    "ServerGone",
    "StaleLayout",
    "TensorSpec",
    "Weights",
]
