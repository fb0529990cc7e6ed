"""A reader's connection that outlives the server.

Mappings need no server: when it dies they go on. But its successor must know who reads, or it would take the memory of
an epoch for free and report nobody. So a thread waits for the end of the connection and makes a new one.
"""

from __future__ import annotations

import logging
import os
import select
import threading
from collections.abc import Callable

from dynamo_box.gms.client.errors import GmsFailure, ServerGone
from dynamo_box.gms.client.session import GmsSession

FIRST_DELAY_S = 0.05
MAX_DELAY_S = 2.0

log = logging.getLogger(__name__)


class Watch:
    """Takes over `session`; `connect` makes an unlocked one, `attach` gets the reader's lock on it."""

    def __init__(
        self, session: GmsSession, connect: Callable[[], GmsSession], attach: Callable[[GmsSession], object]
    ) -> None:
        self._session: GmsSession | None = session
        self._connect = connect
        self._attach = attach
        self._guard = threading.Lock()
        self._stopping = threading.Event()
        self._attached = True
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name="gms-watch", daemon=True)
        self._thread.start()

    def stop(self) -> GmsSession | None:
        """End the thread. The session, if it holds its lock at this moment: the caller's again."""
        with self._guard:
            self._stopping.set()
            os.eventfd_write(self._wake, 1)
            if self._session is not None and not self._attached:
                self._session.interrupt()
        self._thread.join()
        os.close(self._wake)
        session, self._session = self._session, None
        return session

    @property
    def attached(self) -> bool:
        """The server that lives now, as far as we know, knows of this reader."""
        with self._guard:
            return self._attached

    def _run(self) -> None:
        while not self._stopping.is_set():
            session = self._session
            if session is not None and not self._gone(session):
                return
            self._drop()
            self._reconnect()

    def _gone(self, session: GmsSession) -> bool:
        poll = select.poll()
        poll.register(session.fileno(), select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        return self._wake not in dict(poll.poll())

    def _reconnect(self) -> None:
        delay_s, said = FIRST_DELAY_S, ""
        while not self._stopping.wait(delay_s):
            try:
                session = self._connect()
                if not self._publish(session):
                    return
                self._attach(session)
            except GmsFailure as error:
                self._drop()
                delay_s = min(delay_s * 2, MAX_DELAY_S)
                if not isinstance(error, ServerGone) and str(error) != said:
                    said = str(error)
                    log.warning("weights stay mapped, but the server of weight memory won't count us: %s", said)
            else:
                with self._guard:
                    self._attached = True
                return

    def _publish(self, session: GmsSession) -> bool:
        """Let `stop` reach it; False: it has come first."""
        with self._guard:
            if self._stopping.is_set():
                session.close()
                return False
            self._session = session
            return True

    def _drop(self) -> None:
        with self._guard:
            session, self._session, self._attached = self._session, None, False
        if session is not None:
            session.close()
