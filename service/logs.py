"""The process's two logs: its own on stderr, and the audit log on stdout or in a file that is rotated."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler

from service.errors import ConfigError
from service.settings import Settings

_SECONDS = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def set_up(settings: Settings) -> None:
    """Send logs where the settings say. Raises ConfigError when the audit file cannot be written."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if settings.log_format == "json" else logging.Formatter(_SECONDS))
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler])
    for name in ("httpx", "httpcore"):  # they log headers, and so directives
        logging.getLogger(name).setLevel(logging.WARNING)
    audit = logging.getLogger("neuronguard.audit")
    audit.addHandler(_audit(settings))
    audit.setLevel(logging.INFO)
    audit.propagate = False


class JsonLines(logging.Formatter):
    """One JSON object a line. Of an exception only its kind and place: its message may quote a prompt."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info and record.exc_info[0] is not None:
            frames = traceback.extract_tb(record.exc_info[2])[-4:]
            line["exception"] = record.exc_info[0].__name__
            line["place"] = " < ".join(f"{frame.filename}:{frame.lineno}" for frame in reversed(frames))
        return json.dumps(line, ensure_ascii=False)


class _StrictFile(RotatingFileHandler):
    """Lets a failure be seen, where logging would print it and go on: a request is not answered unaudited."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 -- logging's name
        """Called while the exception is being handled."""
        raise  # noqa: PLE0704


class _StrictStream(logging.StreamHandler):  # type: ignore[type-arg]
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 -- logging's name
        raise  # noqa: PLE0704


def _audit(settings: Settings) -> logging.Handler:
    handler: logging.Handler
    if settings.audit_file is None:
        handler = _StrictStream(sys.stdout)
    else:
        try:
            handler = _StrictFile(
                settings.audit_file,
                maxBytes=settings.audit_max_bytes,
                backupCount=settings.audit_keep,
                encoding="utf-8",
            )
        except OSError as error:
            raise ConfigError(f"The audit log cannot be written: {error}.") from error
    handler.setFormatter(logging.Formatter("%(message)s"))
    return handler
