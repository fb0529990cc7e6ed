"""GmsFailure
├─ ServerGone    it ended, doesn't answer, or talks nonsense; another life of it may do better
└─ GmsRefused    it said no, and `code` says why
   ├─ StaleLayout   the committed layout is not the one that was mapped
   ├─ Asleep        the bytes are not on the device
   ├─ OutOfMemory   no room on the device, or in this process
   └─ LockTimeout   somebody else had it for too long
"""

from __future__ import annotations

from dynamo_box.protocol.gms import ErrorCode, GmsError


class GmsFailure(Exception):
    pass


class ServerGone(GmsFailure):
    pass


class GmsRefused(GmsFailure):
    def __init__(self, text: str, code: ErrorCode = "failed") -> None:
        super().__init__(text)
        self.code: ErrorCode = code


class StaleLayout(GmsRefused):
    pass


class Asleep(GmsRefused):
    pass


class OutOfMemory(GmsRefused):
    pass


class LockTimeout(GmsRefused):
    pass


_KINDS: dict[str, type[GmsRefused]] = {
    "stale": StaleLayout,
    "asleep": Asleep,
    "out_of_memory": OutOfMemory,
    "timeout": LockTimeout,
}


def refusal(error: GmsError) -> GmsRefused:
    return _KINDS.get(error.code, GmsRefused)(error.text, error.code)
