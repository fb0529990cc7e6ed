"""Weight memory as a child of the supervisor, which keeps what is committed over the lives of this process."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

from dynamo_box.child_life import Life
from dynamo_box.child_main import allow_all_descriptors
from dynamo_box.errors import BoxError
from dynamo_box.gms.copying import MoveFailed
from dynamo_box.gms.keeping import Keeper, NotKept
from dynamo_box.gms.places import Places
from dynamo_box.gms.server import GmsServer
from dynamo_box.gms.vmm import HostVmm
from dynamo_box.log import get_logger
from dynamo_box.paths import RunDir
from dynamo_box.protocol import status
from dynamo_box.protocol.figures import GmsFigures
from dynamo_box.protocol.framing import listen_unix
from dynamo_box.protocol.gms import KEEPER_FD_VARIABLE
from dynamo_box.protocol.spec import ChildSpec, GmsSpec

log = get_logger()


def keeper_socket_from_environment() -> socket.socket | None:
    """The inherited end of the keeper socket, if there is one; the variable is taken out."""
    value = os.environ.pop(KEEPER_FD_VARIABLE, None)
    if value is None:
        return None
    sock = socket.socket(fileno=int(value))
    os.set_inheritable(sock.fileno(), False)
    return sock


class GmsService:
    """See `child_life.Service`."""

    def __init__(self, spec: GmsSpec, life: Life, keeper_socket: socket.socket | None) -> None:
        self._spec = spec
        self._life = life
        vmm = HostVmm()
        self._keeper = Keeper(keeper_socket)
        self._places = Places(spec, vmm, self._keeper)
        self._server = GmsServer(spec, vmm, self._places, self._keeper, self._on_change)
        self._changed = asyncio.Event()

    async def start(self) -> dict[str, str]:
        """Take over, tidy up, listen."""
        allow_all_descriptors()
        self._life.send(status.Starting("adopting"))
        try:
            problems = await self._server.adopt()
        except NotKept as error:  # the next life may hear it
            raise OSError(str(error)) from error
        for problem in problems:
            self._life.note("warning", problem)
        if self._spec.layouts:
            self._life.send(status.Starting("looking through snapshots"))
            await self._tidy()
        self._server.listen(listen_unix(RunDir(Path(self._spec.run_dir)).worker_socket(self._spec.name)))
        adopted = sum(layout.state == "committed" for layout in self._server.figures().layouts)
        return {"device": self._spec.device, "layouts adopted": str(adopted)}

    async def _tidy(self) -> None:
        try:
            for path in await self._places.clean(self._spec.layouts):
                self._life.note("info", f"removed {path}: a snapshot that nobody will load")
        except MoveFailed as error:
            self._life.note("warning", str(error))

    def _on_change(self) -> None:
        self._changed.set()
        self._life.changed()

    def figures(self) -> GmsFigures:
        return self._server.figures()

    async def command(self, message: status.ParentMessage) -> None:
        match message:
            case status.Move():
                self._life.send(await self._server.move(message))
            case status.Set():
                self._life.send(status.Answer(message.id, error=f"weight memory has no setting {message.key!r}"))
            case status.CancelRequest():
                self._life.send(status.Answer(message.id, error="weight memory runs no requests; the frontend does"))
            case _:
                log.warning("a message that is for another kind of process", message=type(message).__name__)

    async def drain(self, deadline_s: float, life: Life) -> None:
        """Those who write, and layouts on their way, may finish. Readers need nobody to finish for."""
        self._server.stop_listening()
        while True:
            self._changed.clear()
            life.draining(self._server.in_flight)
            if not self._server.in_flight:
                return
            await self._changed.wait()

    async def close(self) -> None:
        """The committed epochs stay with the supervisor."""
        self._places.stop()
        await self._server.close()
        self._places.close()
        self._keeper.close()


def make(spec: ChildSpec, life: Life, keeper_socket: socket.socket | None) -> GmsService:
    if not isinstance(spec, GmsSpec):
        raise BoxError(f"weight memory was handed the spec of {spec.name}, which is another kind")
    return GmsService(spec, life, keeper_socket)
