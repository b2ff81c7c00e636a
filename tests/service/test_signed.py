"""A gateway that sends requests only to engines whose bundle a known key has signed."""

from __future__ import annotations

from pathlib import Path

import pytest

from guard.signature import make_key
from service.errors import ConfigError
from tests.service.fake_engine import CHAT, FakeEngine, a_status
from tests.service.world import World, eventually, world


@pytest.fixture
def two_keys(tmp_path: Path) -> tuple[Path, list[str]]:
    """A file of two public keys, and their names."""
    names = [make_key(tmp_path / name) for name in ("old", "new")]
    file = tmp_path / "trusted.pem"
    file.write_text(
        "ours, until spring\n" + "".join((tmp_path / f"{n}.pub").read_text() for n in ("old", "new"))
    )
    return file, names


async def answered(w: World) -> int:
    return (await w.client.post("/v1/chat/completions", json=CHAT)).status_code


async def test_only_an_engine_whose_bundle_a_known_key_signed_gets_requests(
    tmp_path: Path, two_keys: tuple[Path, list[str]]
) -> None:
    file, names = two_keys
    engine = FakeEngine()
    engine.status = a_status(signed_by=names[1])
    async with world(tmp_path, engine=engine, require_signed_by=file) as w:
        assert await answered(w) == 200
        assert w.total("guard_bundle_mismatch") == 0
        for signed_by, words in ((None, "is not signed"), ("f" * 64, f"is signed by {'f' * 64}")):
            w.engine.status = a_status(signed_by=signed_by)
            await eventually(lambda: w.watch.ready is None)
            assert await answered(w) == 503
            assert words in w.watch.why
            assert w.total("guard_bundle_mismatch") == 1
            w.engine.status = a_status(signed_by=names[0])
            await eventually(lambda: w.watch.ready is not None)
            assert await answered(w) == 200
            assert w.total("guard_bundle_mismatch") == 0


async def test_without_required_keys_the_signer_is_shown_and_nothing_more(tmp_path: Path) -> None:
    engine = FakeEngine()
    engine.status = a_status(signed_by="a" * 64)
    async with world(tmp_path, engine=engine) as w:
        assert await answered(w) == 200
        about = {"digest": "b" * 64, "model": "lab/tiny", "probe": "unsafe_output"}
        assert w.metric("guard_bundle_info", signed_by="a" * 64, **about) == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot read the public keys"),
        ("", "holds no public key"),
        ("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "of another kind"),
        ("-----BEGIN PUBLIC KEY-----\n????\n-----END PUBLIC KEY-----\n", "not base64"),
        ("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "holds a PRIVATE KEY"),
    ],
)
async def test_a_gateway_without_readable_keys_does_not_start(
    tmp_path: Path, content: str | None, words: str
) -> None:
    file = tmp_path / "trusted.pem"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=f"NEURONGUARD_REQUIRE_SIGNED_BY is wrong: .*{words}"):
        async with world(tmp_path, require_signed_by=file):
            pass
