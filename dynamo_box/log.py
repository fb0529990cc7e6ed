"""Structured logs of the box's own processes: JSON lines for a file or the supervisor, key=value for a terminal.

A line is {"ts", "level", "process", "event", …fields}; `request_id` is the field that follows a request from HTTP to
the engine. Engines write the same lines without structlog: see `engines/log.py`.
"""

from __future__ import annotations

import os
import sys
from typing import Any

PROCESS_VARIABLE = "DYNBOX_PROCESS"
LEVEL_VARIABLE = "DYNBOX_LOG_LEVEL"


def configure(process: str | None = None) -> None:
    """Log to stderr, as `process` (default: the name that the supervisor put into the environment)."""
    structlog = _structlog()
    name = process or os.environ.get(PROCESS_VARIABLE, "dynbox")
    level = os.environ.get(LEVEL_VARIABLE, "info").lower()
    renderer: Any = (
        structlog.dev.ConsoleRenderer(colors="NO_COLOR" not in os.environ)
        if sys.stderr.isatty()
        else structlog.processors.JSONRenderer(ensure_ascii=False, default=str)
    )

    def add_process(_logger: Any, _method: str, event: Any) -> Any:
        event["process"] = name
        return event

    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="ts"),
            add_process,
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


def get_logger(**fields: Any) -> Any:
    """A structlog logger: `log.info("event", key=value)`."""
    return _structlog().get_logger(**fields)


def _structlog() -> Any:
    """structlog without rich, which it would import to draw tracebacks that we never ask for: half of its own import,
    in every process of every box.
    """
    hidden = not {"rich", "structlog"} & sys.modules.keys()
    if hidden:
        sys.modules["rich"] = None  # type: ignore[assignment]
    try:
        import structlog
    finally:
        if hidden:
            del sys.modules["rich"]
    return structlog
