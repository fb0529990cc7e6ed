"""`dynbox restart NAME`: drain one process and start it again."""

from __future__ import annotations

from dynamo_box.cli import complete
from dynamo_box.cli.process_acts import AsJson, DrainSeconds, ProcessName, act
from dynamo_box.errors import ExitCode

app = complete.verb()

START_TIMEOUT_S = 600.0
"""A worker that loads a large model from a slow disk is still well; the supervisor has the finer deadline."""


@app.command()
def restart(name: ProcessName, drain: DrainSeconds = 30.0, as_json: AsJson = False) -> ExitCode:
    """Drain and restart one process; returns when it is ready again."""
    return act(name, lambda client: client.restart(name, drain, drain + START_TIMEOUT_S), as_json=as_json)
