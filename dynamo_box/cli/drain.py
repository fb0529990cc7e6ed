"""`dynbox drain NAME`: let one worker finish what it runs, and stop it until it is restarted."""

from __future__ import annotations

from dynamo_box.cli import complete, stderr
from dynamo_box.cli.process_acts import AsJson, DrainSeconds, ProcessName, act
from dynamo_box.control.client import ControlClient
from dynamo_box.errors import ExitCode
from dynamo_box.wording import printable

app = complete.verb()

STOP_MARGIN_S = 30.0
"""On top of the drain: a worker that doesn't go needs TERM, then KILL."""


@app.command()
def drain(name: ProcessName, drain: DrainSeconds = 30.0, as_json: AsJson = False) -> ExitCode:
    """Drain one worker and leave it stopped; new requests go to the others. `dynbox restart` brings it back."""

    def drained(client: ControlClient) -> str:
        if drain:
            stderr.say(f"draining {printable(name)} (running requests get {drain:g} s)")
        try:
            return client.drain(name, drain, drain + STOP_MARGIN_S)
        except KeyboardInterrupt:
            stderr.say("the drain goes on; `dynbox ps` shows how far it is, --drain 0 cuts it short")
            raise

    return act(name, drained, as_json=as_json)
