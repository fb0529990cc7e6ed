"""The language of faults, the same in the option `fault`, in `set_option("fault", …)` and in a request's
annotation `mock:…` (`nvext.annotations`).

    stall[:after=N]     the request produces nothing after its N-th token, until it is cancelled
    crash[:after=N]     the process kills itself, at once or when a request has got N tokens
    freeze[:after=N]    the process stops (SIGSTOP), at once or when a request has got N tokens
    stall|crash|freeze:at=POINT  the same where a request in two legs has come to a point:
        prefill       a prefill leg has begun, and has no token yet
        first_token   its first token has been sent
        handover      its KV could be claimed, if the word of it left
        takeover      a decode leg has all blocks for the KV, which is arriving
    fail_handover       the KV of a prefill leg can't be held for others
    fail_takeover       the KV for a decode leg can't be loaded
    drop_events:N       the next N KV events are not sent: a gap in their numbers
    corrupt_events:N    the next N KV events carry wrong hashes
    garble_events:N     in place of the next N KV events come frames that are no messages
    refuse_start:CAUSE  the engine refuses to start, for good
    fail_start          the engine fails to start; trying again may help
    crash_start         the process kills itself while it starts
    slow_start:S        the start takes S seconds more, without a word
    none                no fault

Stall, crash and freeze with `after` or `at`, and what fails a leg, are in force for every request that comes
later, as an annotation for that request only. The start faults can only be given as an option.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from dynamo_box.protocol.request import Leg

ANNOTATION = "mock:"

Point = Literal["prefill", "first_token", "handover", "takeover"]
RequestFaultKind = Literal["stall", "crash", "freeze", "fail"]
TransferFaultName = Literal["fail_handover", "fail_takeover"]
EventFaultKind = Literal["drop_events", "corrupt_events", "garble_events"]
StartFaultKind = Literal["refuse_start", "fail_start", "crash_start", "slow_start"]


@dataclass(frozen=True)
class RequestFault:
    """`after` counts the request's own output tokens; without it and `at` it happens at once."""

    kind: RequestFaultKind
    after: int | None = None
    at: Point | None = None

    @property
    def leg(self) -> Leg:
        """The leg that comes to `at`."""
        return "decode" if self.at == "takeover" else "prefill"


@dataclass(frozen=True)
class EventFault:
    kind: EventFaultKind
    count: int


@dataclass(frozen=True)
class StartFault:
    kind: StartFaultKind
    cause: str = ""
    seconds: float = 0.0


Fault = RequestFault | EventFault | StartFault


def parse_fault(text: str) -> Fault | None:
    """None for "none" and "".

    Raises:
        ValueError: no such fault, or its argument makes no sense.
    """
    name, _, argument = text.partition(":")
    if name in ("", "none"):
        _no_argument(name or "none", argument)
        return None
    if name == "stall":
        return _when("stall", argument)
    if name == "crash":
        return _when("crash", argument)
    if name == "freeze":
        return _when("freeze", argument)
    if name in get_args(TransferFaultName):
        _no_argument(name, argument)
        return RequestFault("fail", at="handover" if name == "fail_handover" else "takeover")
    if name == "drop_events":
        return EventFault("drop_events", _count(name, argument))
    if name == "corrupt_events":
        return EventFault("corrupt_events", _count(name, argument))
    if name == "garble_events":
        return EventFault("garble_events", _count(name, argument))
    if name == "refuse_start":
        return StartFault("refuse_start", cause=argument or "told to refuse the start")
    if name == "fail_start":
        _no_argument(name, argument)
        return StartFault("fail_start")
    if name == "crash_start":
        _no_argument(name, argument)
        return StartFault("crash_start")
    if name == "slow_start":
        return StartFault("slow_start", seconds=_seconds(name, argument))
    named = ("stall", "crash", "freeze", *get_args(EventFaultKind), *get_args(StartFaultKind))
    raise ValueError(f"no fault {name!r}; there are {', '.join((*named, *get_args(TransferFaultName), 'none'))}")


def parse_annotations(annotations: tuple[str, ...]) -> list[Fault]:
    """The faults that a request asks for.

    Raises:
        ValueError: one that doesn't exist, or that a request can't have.
    """
    faults: list[Fault] = []
    for annotation in annotations:
        if annotation.startswith(ANNOTATION):
            fault = parse_fault(annotation.removeprefix(ANNOTATION))
            if isinstance(fault, StartFault):
                raise ValueError(f"{fault.kind} is a fault of the start, not of a request")
            if fault is not None:
                faults.append(fault)
    return faults


def _no_argument(name: str, argument: str) -> None:
    if argument:
        raise ValueError(f"the fault {name} takes no argument")


def _when(name: Literal["stall", "crash", "freeze"], argument: str) -> RequestFault:
    key, _, value = argument.partition("=")
    if key == "at":
        for point in get_args(Point):
            if point == value:
                return RequestFault(name, at=point)
        raise ValueError(f"the fault {name} takes at={'|'.join(get_args(Point))}, not {argument!r}")
    if not argument:
        return RequestFault(name, 0 if name == "stall" else None)
    if key != "after" or not value.isdecimal():
        raise ValueError(f"the fault {name} takes after=N or at=POINT, as in {name}:after=5, not {argument!r}")
    return RequestFault(name, int(value))


def _count(name: str, argument: str) -> int:
    if not argument.isdecimal() or int(argument) == 0:
        raise ValueError(f"the fault {name} takes a number above 0, as in {name}:3, not {argument!r}")
    return int(argument)


def _seconds(name: str, argument: str) -> float:
    try:
        seconds = float(argument)
    except ValueError:
        seconds = -1.0
    if not 0.0 <= seconds <= 3600.0:
        raise ValueError(f"the fault {name} takes seconds from 0 to 3600, as in {name}:30, not {argument!r}")
    return seconds
