import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from guard.engine.staging import Layout, Staging


def stage(spans: list[tuple[int, int, int]], capacity: int = 64) -> Staging:
    """``spans``: (tokens computed before, tokens scheduled now, prompt length) of each request."""
    staging = Staging(capacity)
    start = np.concatenate([[0], np.cumsum([s for _, s, _ in spans])]).astype(np.int32)
    computed = np.array([c for c, _, _ in spans] + [99], dtype=np.int32)  # buffers are longer than the batch
    prompt = np.array([p for _, _, p in spans] + [99], dtype=np.int32)
    staging.stage(Layout([f"r{i}" for i in range(len(spans))], start, computed, prompt))
    return staging


def test_whole_prompt_reads_its_last_row():
    staging = stage([(0, 5, 5), (0, 3, 3)])
    assert staging.request_ids == ["r0", "r1"]
    assert staging.rows[:2].tolist() == [4, 7]


def test_chunk_before_the_last_reads_nothing():
    assert stage([(0, 4, 10), (4, 4, 10)]).count == 0


def test_last_chunk_reads_the_prompt_end():
    staging = stage([(8, 2, 10)])
    assert staging.rows[: staging.count].tolist() == [1]


def test_decode_reads_nothing():
    assert stage([(10, 1, 10), (25, 1, 10)]).count == 0


def test_prompt_that_ends_inside_a_resumed_chunk_reads_that_row_and_not_the_last():
    # Resumed after preemption: 10 prompt tokens and 4 outputs are computed again in one step.
    staging = stage([(0, 14, 10)])
    assert staging.rows[: staging.count].tolist() == [9]


def test_clear_forgets_the_step():
    staging = stage([(0, 5, 5)])
    staging.clear()
    assert staging.count == 0
    assert staging.request_ids == []


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 40), st.integers(1, 60)), min_size=1, max_size=20)
)
def test_rows_are_those_a_plain_loop_finds(spans: list[tuple[int, int, int]]):
    expected, row = [], 0
    for i, (computed, scheduled, prompt) in enumerate(spans):
        for position in range(computed, computed + scheduled):
            if position == prompt - 1:
                expected.append((f"r{i}", row))
            row += 1
    staging = stage(spans)
    found = list(zip(staging.request_ids, staging.rows[: staging.count].tolist(), strict=True))
    assert found == expected
