from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.service.world import Live, live


@pytest.fixture(scope="module")
def _live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live(tmp_path_factory.mktemp("live")) as running:
        yield running


@pytest.fixture
def gate(_live: Live) -> Live:
    """A gateway and a well-behaved fake engine behind sockets, which behaves well at first."""
    _live.engine.reset()
    return _live
