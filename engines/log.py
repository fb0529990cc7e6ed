"""The box's JSON log lines through stdlib logging, for venvs that hold nothing but an engine.

log = get_logger(); log.info("loaded", bytes=n, request_id=rid)
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import sys
from typing import Any


class _JsonLine(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line: dict[str, Any] = {
            "ts": at.isoformat(timespec="microseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "process": self._process,
            "event": record.getMessage(),
        }
        line.update(getattr(record, "fields", {}))
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class Logger:
    """Keyword fields over a stdlib logger, so that call sites read like the box's own."""

    def __init__(self, logger: logging.Logger, fields: dict[str, Any]) -> None:
        self._logger = logger
        self._fields = fields

    def bind(self, **fields: Any) -> Logger:
        return Logger(self._logger, {**self._fields, **fields})

    def debug(self, event: str, **fields: Any) -> None:
        self._log(logging.DEBUG, event, fields)

    def info(self, event: str, **fields: Any) -> None:
        self._log(logging.INFO, event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        self._log(logging.WARNING, event, fields)

    def error(self, event: str, **fields: Any) -> None:
        self._log(logging.ERROR, event, fields)

    def exception(self, event: str, **fields: Any) -> None:
        self._log(logging.ERROR, event, fields, exc_info=True)

    def _log(self, level: int, event: str, fields: dict[str, Any], exc_info: bool = False) -> None:
        if self._logger.isEnabledFor(level):
            extra = {"fields": {**self._fields, **fields}}
            self._logger.log(level, "%s", event, exc_info=exc_info, extra=extra)


def configure() -> None:
    """Send everything that is logged in this process, an engine library's lines too, to stderr as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLine(os.environ.get("DYNBOX_PROCESS", "engine")))
    level = os.environ.get("DYNBOX_LOG_LEVEL", "info").upper()
    logging.basicConfig(level=level, handlers=[handler], force=True)


def get_logger(**fields: Any) -> Logger:
    return Logger(logging.getLogger("engine"), fields)
