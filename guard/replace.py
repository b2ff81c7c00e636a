"""Put a finished directory in the place of another, so that a reader finds the old one or the new one."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import tempfile
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_UNKNOWN = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


def replace_directory(staging: Path, target: Path) -> None:
    """Rename ``staging`` to ``target``; a directory that is there already is removed. Raises OSError.

    Both must be on one file system. On Linux one system call exchanges the two, renameat2(2), so there is no
    moment without ``target``. Where kernel or file system do not know it, the old directory is set aside
    first and put back when the new one cannot take its place.
    """
    if not target.exists():
        staging.rename(target)
    elif _exchange(staging, target):
        # ``staging`` is the old directory now. The new one is in place, whether or not this succeeds.
        shutil.rmtree(staging, ignore_errors=True)
    else:
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
        old = target.rename(aside / target.name)
        try:
            staging.rename(target)
        except BaseException:
            old.rename(target)
            raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two paths in one step; False where that is not possible. Raises OSError."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    paths = _AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second)
    if renameat2(*paths, ctypes.c_uint(_RENAME_EXCHANGE)) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNKNOWN:
        return False
    raise OSError(code, os.strerror(code), str(first), None, str(second))
