"""What is answered over control.sock when the box itself is at fault."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from dynamo_box.errors import ExitCode
from dynamo_box.protocol import control
from dynamo_box.protocol.framing import Channel, connect_channel, listen_unix
from dynamo_box.supervisor.box import Box
from dynamo_box.supervisor.control_server import ControlServer, Stopper

DEADLINE_S = 60.0


async def restart(process: str, drain_s: float) -> str:
    raise KeyError(process)


def test_a_defect_is_answered_too(tmp_path: Path) -> None:
    """Whoever asked must not wait for an answer that never comes."""

    told: list[tuple[str, str | None, str]] = []

    async def asked() -> control.ControlReply:
        events = SimpleNamespace(add=lambda *event: told.append(event))
        box = cast(Box, SimpleNamespace(acts=SimpleNamespace(restart=restart), models=None, events=events))
        server = ControlServer(box, cast(Stopper, None))
        await server.start(listen_unix(tmp_path / "control.sock"))
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        channel = await connect_channel(
            tmp_path / "control.sock",
            lambda: Channel(control.reply_decoder, lambda _channel, reply: answer.set_result(reply)),
        )
        try:
            channel.send(control.Restart(7, "router", 0.0))
            async with asyncio.timeout(DEADLINE_S):
                return cast(control.ControlReply, await answer)
        finally:
            channel.close()
            await server.close()

    reply = asyncio.run(asked())
    assert isinstance(reply, control.Error)
    assert (reply.id, reply.code) == (7, ExitCode.FAILED)
    assert "KeyError('router')" in reply.what
    assert told == [("error", None, reply.what)]
