"""The process's two logs: its own on stderr, and the audit log on stdout or in a file that is rotated."""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from contextlib import suppress
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import TextIO

from service.errors import ConfigError
from service.settings import Settings

_LONGEST_LINE = 1 << 16
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
    """Lets a failure be seen, where logging would print it and go on: a request is not answered unaudited.

    What could not be written is dropped, buffers and halves of lines included. It is about a request that was
    not answered, and would else come out with a later line, or be the beginning of one.
    """

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 -- logging's name
        """Called while the exception is being handled."""
        stream, self.stream = self.stream, None
        with suppress(OSError):
            if stream is not None:
                _discard(stream)
            cut_to_whole_lines(Path(self.baseFilename))
        raise  # noqa: PLE0704


def _discard(stream: TextIO) -> None:
    """Close a file without writing what is in its buffers."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, stream.fileno())
    finally:
        os.close(nowhere)
    stream.close()


def cut_to_whole_lines(path: Path) -> None:
    """Remove the beginning of a line at the end of a file. Raises OSError."""
    if not path.is_file():
        return
    with path.open("r+b") as file:
        start = max(file.seek(0, os.SEEK_END) - _LONGEST_LINE, 0)
        file.seek(start)
        tail = file.read()
        file.truncate(start + tail.rfind(b"\n") + 1)


class _StrictStream(logging.StreamHandler):  # type: ignore[type-arg]
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 -- logging's name
        raise  # noqa: PLE0704


def _audit(settings: Settings) -> logging.Handler:
    handler: logging.Handler
    if settings.audit_file is None:
        handler = _StrictStream(sys.stdout)
    else:
        try:
            cut_to_whole_lines(settings.audit_file)
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
