"""The log: where it goes, and how a line of it looks: for people, or one JSON object for programs.

A record may carry `fields` (`log.info(text, extra={"fields": {...}})`): in text they follow as `name=value`,
in JSON they are keys of their own.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Any, Literal


def configure_logging(log_format: Literal["text", "json"] = "text") -> None:
    """The library's notes (devices, slices, the memory budget) and everybody's warnings, on stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("lamina_jax").setLevel(logging.INFO)


class TextFormatter(logging.Formatter):
    """The message, and its fields behind it."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return " ".join([record.message, *(f"{name}={value}" for name, value in _fields(record).items())])


class JsonFormatter(logging.Formatter):
    """One object: time (UTC), level, logger, message, the fields, and where there is one the traceback."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return getattr(record, "fields", {})
