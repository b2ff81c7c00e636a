"""The kept inputs, and mutations of them: what ``python -m tests.fuzz`` does for longer and with coverage."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz import bundle_targets, gateway_targets
from tests.fuzz.corpus import CORPUS, LONGEST, inputs

TARGETS = gateway_targets.TARGETS | bundle_targets.TARGETS


@st.composite
def mutated(draw: st.DrawFn, kept: list[bytes]) -> bytes:
    """A kept input with some bytes changed, cut out, doubled, or put in."""
    data = bytearray(draw(st.sampled_from(kept)))
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, len(data)))
        length = draw(st.integers(0, 12))
        match draw(st.sampled_from(("set", "cut", "double", "insert", "end"))):
            case "set":
                data[place : place + 1] = draw(st.binary(min_size=1, max_size=1))
            case "cut":
                del data[place : place + length]
            case "double":
                data[place:place] = data[place : place + length]
            case "insert":
                data[place:place] = draw(st.binary(max_size=8) | st.sampled_from(WORDS))
            case "end":
                del data[place:]
    return bytes(data)


WORDS = [
    *(b"\r\n\r\n", b"data: ", b"null", b"1e999", b"NaN", b'"\\ud800"', b"\xff", b"{", b"!!int "),
    *(b"[" * 70, b"0" * 5000),
]


def test_every_target_has_inputs_and_every_input_a_target() -> None:
    assert {path.name for path in CORPUS.iterdir()} == set(TARGETS)
    assert all(inputs(target) for target in TARGETS)


@pytest.mark.parametrize(
    "path", [path for target in TARGETS for path in inputs(target)], ids=lambda p: f"{p.parent.name}/{p.name}"
)
def test_kept_inputs(path: Path) -> None:
    data = path.read_bytes()
    assert len(data) <= LONGEST
    TARGETS[path.parent.name](data)


@pytest.mark.parametrize("target", TARGETS)
def test_mutations_of_kept_inputs(target: str) -> None:
    kept = [path.read_bytes() for path in inputs(target)]

    @settings(deadline=None, max_examples=50, suppress_health_check=list(HealthCheck))
    @given(mutated(kept) | st.binary(max_size=200))
    def holds(data: bytes) -> None:
        TARGETS[target](data)

    holds()
