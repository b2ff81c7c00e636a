"""Parts of a long study: each is kept, as soon as it is whole, under a digest of all that it depends on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from guard.cache import Cache


def part(store: Path, key: Any, compute: Callable[[], Any]) -> Any:
    """A JSON document: read back from ``store``, or computed now and kept.

    Parts do not know the code that made them: after a change of a method, remove the folder.
    """
    cache = Cache(store)
    found = cache.texts("parts", key)
    if found is None:
        cache.keep_texts("parts", key, [json.dumps(compute(), allow_nan=False)])
        found = cache.texts("parts", key)
    assert found is not None
    return json.loads(found[0])
