"""Taps on small torch modules: what they read, what they leave alone, and what they cost."""

from __future__ import annotations

import gc
import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from guard.bundle import Site
from guard.engine.errors import GuardStartupError
from guard.scorer import ProbeKind
from tests.engine import tapped
from tests.engine.tapped import CAPACITY, Model, Reference, Span, make, step

pytestmark = [  # vLLM and its dependencies warn a lot
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error:::guard"),
]
SPANS = tapped.SPANS
KINDS: tuple[ProbeKind, ...] = ("linear", "mlp", "product")


def scored(replayed: bool, kind: ProbeKind = "linear", spans: list[Span] = SPANS) -> dict[str, float]:
    model = Model()
    return step(make(model, tapped.bundle(kind), replayed=replayed), model, spans, tapped.rows(spans))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("replayed", [False, True])
def test_logits_are_the_bundles_own_at_final_prompt_tokens_only(replayed: bool, kind: ProbeKind) -> None:
    expected = Reference(Model()).logits(tapped.bundle(kind), tapped.rows(SPANS), SPANS)
    assert list(expected) == ["r1", "r3"]
    assert scored(replayed, kind) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_both_ways_to_run_read_the_same(kind: ProbeKind) -> None:
    assert scored(True, kind) == scored(False, kind)


@torch.no_grad()
@pytest.mark.parametrize("replayed", [False, True])
def test_the_models_output_is_untouched(replayed: bool) -> None:
    plain, model = Model(), Model()
    taps, x = make(model, tapped.bundle(), replayed=replayed), tapped.rows(SPANS)
    taps.stage(tapped.layout(SPANS))
    assert torch.equal(model(x), plain(x))


SPAN = st.tuples(st.integers(0, 6), st.integers(1, 5), st.integers(1, 8))
STEP = st.lists(SPAN, min_size=1, max_size=CAPACITY)
UNSTAGED = st.integers(1, 12)  # tokens of a dummy run


@settings(max_examples=25, deadline=None)
@given(st.lists(st.one_of(STEP, UNSTAGED), min_size=1, max_size=8))
@pytest.mark.parametrize("replayed", [False, True])
def test_no_step_or_dummy_run_leaves_anything_behind(replayed: bool, steps: list[list[Span] | int]) -> None:
    model, made = Model(), tapped.bundle()
    reference, taps = Reference(model), make(model, made, replayed=replayed)
    for seed, spans in enumerate(steps):
        if isinstance(spans, int):
            with torch.no_grad():
                model(tapped.rows([(0, spans, 99)], seed))
            assert taps.score() is None
            continue
        x = tapped.rows(spans, seed)
        assert step(taps, model, spans, x) == pytest.approx(reference.logits(made, x, spans), abs=1e-4)


@pytest.mark.parametrize("replayed", [False, True])
def test_a_layer_that_did_not_run_makes_its_score_no_number(replayed: bool) -> None:
    model = Model()
    taps, x = make(model, tapped.bundle(), replayed=replayed), tapped.rows(SPANS)
    assert all(logit == logit for logit in step(taps, model, SPANS, x).values())
    without_last = lambda x: [layer(x) for layer in model.model.layers[:2]]  # noqa: E731
    assert all(logit != logit for logit in step(taps, without_last, SPANS, x).values())


@pytest.mark.parametrize("replayed", [False, True])
def test_features_in_a_short_dtype_are_scored_in_float32(replayed: bool) -> None:
    model, made = Model().bfloat16(), tapped.bundle()
    x = tapped.rows(SPANS, dtype=torch.bfloat16)
    expected = Reference(model).logits(made, x, SPANS)
    taps = make(model, made, replayed=replayed, dtype=torch.bfloat16)
    assert step(taps, model, SPANS, x) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("replayed", [False, True])
def test_layer_whose_input_is_of_another_dtype_is_read_all_the_same(replayed: bool) -> None:
    model, made = Model(), tapped.bundle()
    expected = Reference(model).logits(made, tapped.rows(SPANS), SPANS)
    taps = make(model, made, replayed=replayed, dtype=torch.bfloat16)
    found = step(taps, model, SPANS, tapped.rows(SPANS))
    assert found == pytest.approx(expected, rel=0.05, abs=0.2)
    assert found != pytest.approx(expected, abs=1e-6)  # rounded on the way


@pytest.mark.parametrize("replayed", [False, True])
def test_input_that_is_a_part_of_a_larger_tensor_is_read_by_its_own_rows(replayed: bool) -> None:
    model, sites = Model(), (Site(layer=0, kind="mlp", units=(1, 23)),)
    made = tapped.bundle(sites=sites)
    taps = make(model, made, replayed=replayed)
    larger = torch.randn(15, 2 * tapped.MLP)
    x = larger[:, ::2]
    found = step(taps, model.model.layers[0].mlp.down_proj, SPANS, x)
    features = x[[6, 14]][:, [1, 23]].numpy()
    assert list(found.values()) == pytest.approx(made.logits(features).tolist(), abs=1e-5)


@pytest.mark.parametrize("replayed", [False, True])
def test_input_of_another_width_is_an_error(replayed: bool) -> None:
    model = Model()
    taps = make(model, tapped.bundle(), replayed=replayed)
    taps.stage(tapped.layout(SPANS))
    with pytest.raises(ValueError, match="was given 23 columns, expected 24"):
        model.model.layers[0].mlp.down_proj(torch.zeros(15, 23))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_model_reads_what_the_plain_one_does(backend: str) -> None:
    model, made = Model(), tapped.bundle()
    reference, taps = Reference(model), make(model, made, replayed=True)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for seed, spans in enumerate([SPANS, [(0, 2, 2)], [(5, 1, 3), (0, 7, 7)], SPANS]):
        x = tapped.rows(spans, seed)
        assert step(taps, compiled, spans, x) == pytest.approx(reference.logits(made, x, spans), abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 3, 9])
def test_the_operation_is_declared_as_it_behaves(tokens: int, dtype: torch.dtype) -> None:
    from guard.engine import ops  # noqa: F401

    index = torch.zeros(CAPACITY, 5, dtype=torch.int64)
    arguments = (torch.randn(tokens, 8), index, torch.zeros(CAPACITY, 5, dtype=dtype), 1, 4, 8)
    results = torch.library.opcheck(torch.ops.neuronguard.gather.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("replayed", [False, True])
def test_no_step_takes_memory_that_it_does_not_give_back(replayed: bool) -> None:
    model = Model()
    taps, x = make(model, tapped.bundle("mlp"), replayed=replayed), tapped.rows(SPANS)
    lasting = [taps._index, taps._features, taps._head._hidden, taps._head._logits]
    before = [tensor.data_ptr() for tensor in lasting]

    def run(times: int) -> None:
        for _ in range(times):
            step(taps, model, SPANS, x)
            step(taps, model, [(0, 15, 15)], x)

    def tensors() -> int:
        gc.collect()
        return sum(isinstance(thing, Tensor) for thing in gc.get_objects())

    run(10)
    warm = tensors()
    tracemalloc.start()
    try:
        run(100)
        gc.collect()
        kept = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert [tensor.data_ptr() for tensor in lasting] == before
    assert tensors() == warm
    assert kept < 20_000  # bytes of 200 steps: less than one object for each


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_of_all_its_tensors(kind: ProbeKind, dtype: torch.dtype) -> None:
    taps = make(Model(), tapped.bundle(kind), replayed=True, dtype=dtype)
    tensors = [
        thing
        for part in (taps, taps._head, taps._buffers)
        for thing in vars(part).values()
        if isinstance(thing, Tensor)
    ]
    assert len(tensors) >= 7
    assert taps.bytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_a_layer_in_a_wrapper_is_read_at_the_wrapper() -> None:
    class Wrapped(nn.Module):
        """As vLLM's LoRA layers: it calls the base layer's parts, not the layer."""

        def __init__(self, base_layer: nn.Module) -> None:
            super().__init__()
            self.base_layer = base_layer

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.base_layer.weight

    model, made = Model(), tapped.bundle()
    reference = Reference(model)
    for layer in model.model.layers:
        layer.mlp.down_proj = Wrapped(layer.mlp.down_proj)
    x = tapped.rows(SPANS)
    found = step(make(model, made, replayed=False), model, SPANS, x)
    assert found == pytest.approx(reference.logits(made, x, SPANS), abs=1e-5)


@pytest.mark.parametrize("replayed", [False, True])
def test_a_step_in_which_nobody_waits_is_not_scored_and_the_next_one_is(replayed: bool) -> None:
    model, made = Model(), tapped.bundle()
    reference, taps = Reference(model), make(model, made, replayed=replayed)
    x = tapped.rows(SPANS)
    assert step(taps, model, SPANS, x, idle=True) == {}
    assert step(taps, model, SPANS, x) == pytest.approx(reference.logits(made, x, SPANS), abs=1e-5)


def test_width_of_a_wrapped_layer_is_that_of_the_layer() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_layer = tapped.Linear(48)

    model = Model()
    model.model.layers[0].mlp.down_proj = Wrapped()
    with pytest.raises(GuardStartupError, match="takes 48 columns here"):
        make(model, tapped.bundle(), replayed=False)


def test_model_without_a_site_is_refused() -> None:
    model = Model()
    del model.model.layers[2]
    with pytest.raises(GuardStartupError, match=r"no module model\.layers\.2\.self_attn\.o_proj"):
        make(model, tapped.bundle(), replayed=False)


def test_layer_of_another_width_is_refused() -> None:
    model = Model()
    model.model.layers[0].mlp.down_proj = tapped.Linear(48)
    with pytest.raises(GuardStartupError, match="takes 48 columns here, but the bundle was fitted on 24"):
        make(model, tapped.bundle(), replayed=False)


def test_layer_that_splits_its_input_itself_is_refused() -> None:
    model = Model(ranks=2)
    model.model.layers[0].mlp.down_proj.input_is_parallel = False
    with pytest.raises(GuardStartupError, match="splits its input itself"):
        make(model, tapped.bundle(), replayed=False)
