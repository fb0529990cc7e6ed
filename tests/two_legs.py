"""Requests to a box whose prompts are computed on one worker and answered by another: streams that can be given up at
any point, and what the box may hold once nobody wants anything of it any more.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from typing import Any

from box_under_test import Box, eventually

TIMEOUT_S = 120.0


class Failed(Exception):
    """The request ended with an error: its message."""


class BrokenOff(Failed):
    """Nobody said how the request ended."""


class Ask:
    """One streamed completion. It is sent at once; `pieces` waits for its answer, `close` gives it up."""

    def __init__(self, box: Box, body: dict[str, Any], timeout_s: float = TIMEOUT_S) -> None:
        self.text = ""
        self.usage: dict[str, Any] = {}
        self.workers: tuple[str | None, str | None] = (None, None)
        """Who computed the prompt, and who answered; the first is None for a request in one leg."""
        wanted = {"nvext": {}, **body, "stream": True, "stream_options": {"include_usage": True}}
        wanted["nvext"] = {"ignore_eos": True, "extra_fields": ["worker_id"], **wanted["nvext"]}
        self._connection = http.client.HTTPConnection("127.0.0.1", box.port, timeout=timeout_s)
        headers = {"content-type": "application/json"}
        self._unsent: ConnectionError | None = None
        try:
            self._connection.request("POST", "/v1/completions", json.dumps(wanted).encode(), headers)
        except ConnectionError as error:
            self._unsent = error
        self._pieces = self._read()

    def pieces(self) -> Iterator[str]:
        """The text, as it comes; asked for again it goes on.

        Raises:
            Failed: it ended with an error.
            BrokenOff: the connection ended before it did.
        """
        return self._pieces

    def _read(self) -> Iterator[str]:
        try:
            for event in self._events():
                if "error" in event:
                    raise Failed(event["error"]["message"])
                self.usage = event.get("usage") or self.usage
                if extension := event.get("nvext"):
                    self.workers = (extension.get("prefill_worker_id"), extension["worker_id"])
                for choice in event["choices"]:
                    if choice["text"]:
                        self.text += choice["text"]
                        yield choice["text"]
        except (ConnectionError, http.client.HTTPException) as error:
            raise BrokenOff(f"{error!r} after {len(self.text)} characters") from error
        finally:
            self.close()

    def _events(self) -> Iterator[dict[str, Any]]:
        if self._unsent is not None:
            raise self._unsent
        response = self._connection.getresponse()
        if response.status != 200:
            yield json.loads(response.read())
            return
        for line in response:
            if line.strip() == b"data: [DONE]":
                return
            if line.startswith(b"data: "):
                yield json.loads(line[len(b"data: ") :])
        raise BrokenOff(f"the stream ended after {len(self.text)} characters")

    def whole(self) -> Ask:
        for _ in self.pieces():
            continue
        return self

    @property
    def said(self) -> tuple[str, int, int]:
        """What is the same however the request was served: text, and tokens of prompt and answer."""
        return self.text, self.usage["prompt_tokens"], self.usage["completion_tokens"]

    def close(self) -> None:
        """If it isn't over, the frontend finds the client gone."""
        self._connection.close()


def figures(box: Box, process: str) -> dict[str, Any]:
    """The latest ones; {} while it has none."""
    return dict(box.process(process)["figures"] or {})


def workers(box: Box) -> list[str]:
    return [each["name"] for each in box.ps()["processes"] if each["kind"] == "worker"]


def held(box: Box) -> dict[str, Any]:
    """What is in use, by process and figure; who doesn't report is in it too."""
    found: dict[str, Any] = {}

    def look(name: str, report: dict[str, Any], *gauges: str) -> None:
        for gauge in gauges:
            if value := report[gauge]:
                found[f"{name} {gauge}"] = value

    for process in box.ps()["processes"]:
        name, report = process["name"], process["figures"]
        if report is None:
            found[name] = "no figures"
        elif process["kind"] == "worker":
            look(name, report, "running", "waiting", "kv_blocks_used")
            look(name, report["tiers"], "connected", "queued", "pinned")
        elif process["kind"] == "kvstore":
            look(name, report, "leases")
            for layout in report["layouts"]:
                look(f"{name} {layout['name']}", layout, "host_writing", "host_leased")
        elif process["kind"] == "router":
            look(name, report, "active_requests")
        elif process["kind"] == "frontend":
            look(name, report, "active")
    return found


def nothing_is_held(box: Box, deadline_s: float = 90.0) -> None:
    """What was handed over is held until its time is up if there was nobody to say that nobody wants it any more."""
    box.wait_ready()
    latest: dict[str, Any] = {}

    def free() -> bool:
        latest.clear()
        latest.update(held(box))
        return not latest

    eventually(free, f"nothing is held ({latest})", deadline_s)
