"""``python -m guard.healthcheck URL``: exit status 0 when the URL answers 200. For container health checks.

Only the standard library is imported: a check runs every few seconds beside the process that it watches.
"""

from __future__ import annotations

import sys
import urllib.error
import urllib.request

TIMEOUT = 4.0
"""Seconds."""


def check(url: str) -> str | None:
    """None when ``url`` answers 200, else what it said instead, for the health log."""
    if not url.startswith(("http://", "https://")):
        return f"'{url}' is not an http URL"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never by way of a proxy
    try:
        with opener.open(url, timeout=TIMEOUT):
            return None
    except urllib.error.HTTPError as error:
        with error:
            return f"{error.code}: {error.read(500).decode('utf-8', 'replace')}"
    except OSError as error:
        return f"{url} does not answer: {error}"


def main(arguments: list[str]) -> int:
    """Check the one URL given; returns the exit status."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m guard.healthcheck URL\n")
        return 2
    problem = check(arguments[0])
    if problem:
        sys.stdout.write(f"{problem}\n")
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
