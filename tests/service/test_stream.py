from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.stream import AnswerWatch, SseDecoder, StreamError, data_of, error_frame, parse_json_object

ENDS = [b"\n", b"\r\n", b"\r"]
lines = st.binary(max_size=12).map(lambda line: b"data: " + line.replace(b"\r", b"").replace(b"\n", b""))


@st.composite
def streams(draw: st.DrawFn) -> tuple[list[bytes], bytes]:
    """Frames with one kind of line end, and a tail that no empty line ends."""
    end = draw(st.sampled_from(ENDS))
    frames = draw(st.lists(st.lists(lines, min_size=1, max_size=3), max_size=6))
    return [end.join(frame) + end + end for frame in frames], draw(
        st.sampled_from([b"", b"data: cut", b"da"])
    )


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[a:b] for a, b in pairwise(edges)]


@settings(deadline=None, max_examples=60)
@given(streams(), st.lists(st.integers(0, 1000), max_size=30))
def test_frames_do_not_depend_on_chunks(stream: tuple[list[bytes], bytes], places: list[int]) -> None:
    frames, tail = stream
    decoder = SseDecoder()
    found = [frame for part in cut(b"".join(frames) + tail, places) for frame in decoder.decode(part)]
    assert found + decoder.flush() == frames


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=80) | st.text(alphabet="a\r\n", max_size=40).map(str.encode), st.integers(1, 7))
def test_any_bytes_come_out_as_they_went_in(data: bytes, size: int) -> None:
    decoder = SseDecoder()
    out = [frame for at in range(0, len(data), size) for frame in decoder.decode(data[at : at + size])]
    joined = b"".join(out + decoder.flush())
    assert data.startswith(joined)
    whole = SseDecoder()
    assert joined == b"".join(whole.decode(data) + whole.flush())


def test_a_frame_comes_out_as_soon_as_it_is_complete() -> None:
    decoder = SseDecoder()
    assert decoder.decode(b"data: 1\n") == []
    assert decoder.decode(b"\ndata: 2") == [b"data: 1\n\n"]
    assert decoder.decode(b"\n\n") == [b"data: 2\n\n"]
    assert decoder.flush() == []


def test_a_frame_that_was_cut_off_is_dropped() -> None:
    decoder = SseDecoder()
    assert decoder.decode(b'data: {"half') == []
    assert decoder.flush() == []


@pytest.mark.parametrize("data", [b"data: " + b"x" * 100, b"data: " + b"x" * 100 + b"\n\n"])
def test_a_frame_may_not_grow_without_end(data: bytes) -> None:
    with pytest.raises(StreamError, match="too long"):
        SseDecoder(max_frame=64).decode(data)


def test_watch_notes_end_errors_and_usage() -> None:
    watch = AnswerWatch()
    watch.look(b": keep-alive\n\n")
    watch.look(b'data: {"usage": {"completion_tokens": 5}}\n\n')
    watch.look(b'data: {"choices": []}\n\n')
    assert (watch.finished, watch.failed, watch.completion_tokens) == (False, False, 5)
    watch.look(b'data: {"error": {"message": "no"}}\n\n')
    watch.look(b"data: [DONE]\n\n")
    assert (watch.finished, watch.failed) == (True, True)


@pytest.mark.parametrize("payload", [b"<html>", b"[1]", b'{"half":', b"[DONE"])
def test_watch_stops_what_is_not_json(payload: bytes) -> None:
    with pytest.raises(StreamError, match="not a JSON object"):
        AnswerWatch().look(b"data: " + payload + b"\n\n")


def test_data_lines_are_joined() -> None:
    assert data_of(b"event: x\r\ndata: a\r\ndata:b\r\n\r\n") == b"a\nb"
    assert data_of(b"event: ping\n\n") is None


def test_error_frame_is_one_frame_with_openai_shape() -> None:
    (frame,) = SseDecoder().decode(error_frame("cut off", "upstream_interrupted"))
    value = parse_json_object(data_of(frame) or b"")
    assert value is not None
    assert set(value["error"]) == {"message", "type", "param", "code"}
