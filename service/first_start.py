"""``python -m service.first_start FOLDER``: make the secrets of a new deployment that are not there yet.

    shared/guard.keys         key ring of engine and gateway
    client/api-key            an API key whose requests are guarded
    client/api-key-observe    an API key whose requests are scored and always answered
    gateway/policies.yaml     the policies of both, with the keys' digests
    grafana/admin-password

Nothing that exists is changed. Files belong to the owner of their folder, who may edit them, and to the group
under which the containers run, which may read them; nobody else can.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import sys
import tempfile
from pathlib import Path

from guard.sealed import Keyring

GROUP = 10001
"""Group id of the containers' user."""
GRAFANA_GROUP = 0
"""That of the user in Grafana's own image."""
MODE = 0o640
CLIENTS = {"api-key": "default", "api-key-observe": "observe"}
"""Files under ``client`` and the policies of their keys."""

_POLICIES = """\
# Policies and API keys: docs/operations.md. The gateway reads this file again when it changes.
policies:
  # Refuse at the engine's default operating point.
  default: {}
  # Score everything and answer it all the same: what enforcing would do shows in the metrics.
  observe: {mode: observe}
keys:
"""


def prepare(folder: Path, group: int = GROUP, grafana_group: int = GRAFANA_GROUP) -> list[str]:
    """Make what is missing and return the names of the files made. Raises OSError."""
    made = []

    def make(name: str, text: str, reader: int) -> None:
        path = folder / name
        if not path.exists():
            write_once(path, text, reader)
            made.append(name)

    ring = Keyring.generate()
    make("shared/guard.keys", "".join(f"{kid}:{key.hex()}\n" for kid, key in ring.keys), group)
    if not (folder / "gateway" / "policies.yaml").exists():
        lines = []
        for name, policy in CLIENTS.items():
            make(f"client/{name}", f"ng-{secrets.token_urlsafe(32)}\n", group)
            digest = hashlib.sha256((folder / "client" / name).read_bytes().strip()).hexdigest()
            lines.append(f"  - {{sha256: {digest}, tenant: first, policy: {policy}}}\n")
        make("gateway/policies.yaml", _POLICIES + "".join(lines), group)
    make("grafana/admin-password", secrets.token_urlsafe(24), grafana_group)
    return made


def write_once(path: Path, text: str, group: int) -> None:
    """Write a file whole or not at all, and never over another one. Raises FileExistsError."""
    path.parent.mkdir(exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=".new-", dir=path.parent)  # mode 0600
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            if os.geteuid() == 0:  # others can only give files to their own groups
                os.fchown(descriptor, path.parent.stat().st_uid, group)
                os.fchmod(descriptor, MODE)
        os.link(name, path)
    finally:
        os.unlink(name)


def main(arguments: list[str]) -> int:
    """Returns the process's exit status."""
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        sys.stderr.write("usage: python -m service.first_start FOLDER, which must exist\n")
        return 2
    try:
        made = prepare(Path(arguments[0]))
    except OSError as error:
        sys.stderr.write(f"neuronguard: the secrets cannot be made: {error}\n")
        return 1
    sys.stdout.writelines(f"made {name}\n" for name in made)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
