"""A sequence probe's taps on a small model: scores kept by KV slot, whoever computed them and when."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guard.bundle import Bundle
from guard.engine.errors import GuardStartupError
from guard.engine.sequence import SequenceTaps
from guard.engine.staging import KvPlaces
from guard.pooling import Pooling
from guard.sequence import SequenceScorer
from tests.engine import tapped
from tests.engine.cards import card
from tests.engine.tapped import HIDDEN, MODEL, SITES, Model, Reference

pytestmark = [  # vLLM and its dependencies warn a lot
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error:::guard"),
]
BLOCK, BLOCKS, TOKENS, REQUESTS = 4, 40, 64, 4
POOLINGS = (
    Pooling(kind="ema", rate=0.4, window=16),
    Pooling(kind="rolling", window=5),
    Pooling(kind="softmax", temperature=0.7, window=6),
    Pooling(kind="attention", heads=2, window=6),
)
EMBEDDING = torch.randn(50, HIDDEN, generator=torch.Generator().manual_seed(3))
"""What a token id is to the small model, whose layers look at one token at a time."""


def make_bundle(pooling=POOLINGS[0], sites=SITES):
    features = card(model=MODEL, sites=sites).features
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((pooling.channels, features)).astype(np.float32)
    scorer = SequenceScorer(pooling, weight, rng.standard_normal(pooling.channels).astype(np.float32))
    return Bundle(card(model=MODEL, sites=sites, probe="sequence", pooling=pooling), scorer)


class Engine:
    """What a runner does with block tables, in small, and the taps on its model."""

    def __init__(self, bundle, *, replayed=False, ranks=1, rank=0, all_reduce=None):
        self.model = Model(ranks, rank)
        self.taps = SequenceTaps(
            bundle,
            bundle.sequence,
            self.model,
            max_requests=REQUESTS,
            max_tokens=TOKENS,
            dtype=torch.float32,
            device=torch.device("cpu"),
            replayed=replayed,
            rank=rank,
            all_reduce=all_reduce,
        )
        self.taps.allocate(BLOCKS * BLOCK)

    @torch.no_grad()
    def step(self, work, watched=False):
        """``work``: for each request (its token ids, its blocks, computed, scheduled, prompt tokens)."""
        spans = [(computed, scheduled, prompt) for _, _, computed, scheduled, prompt in work]
        table = torch.zeros((REQUESTS, 32), dtype=torch.int32)
        slots, ids = [], []
        for row, (tokens, blocks, computed, scheduled, _) in enumerate(work):
            table[row, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
            for position in range(computed, computed + scheduled):
                slots.append(blocks[position // BLOCK] * BLOCK + position % BLOCK)
                ids.append(tokens[position])
        places = KvPlaces(torch.tensor(slots + [-1] * 5), table, BLOCK)
        self.taps.begin(watched=watched)
        self.taps.stage(tapped.layout(spans)._replace(places=places))
        self.model(EMBEDDING[ids])
        scores, running = self.taps.score(), self.taps.watch()
        self.taps.clear()
        return scores.take() if scores else {}, running.take_array() if running else None


def features(bundle, tokens):
    """Activations ``[tokens, features]`` by a copy of the model that the guard does not touch."""
    inputs = Reference(Model()).inputs(EMBEDDING[list(tokens)])
    read = [inputs[site.kind, site.layer][:, bundle.card.columns(site)] for site in bundle.card.sites]
    return torch.cat(read, 1).numpy()


def expected(bundle, tokens):
    return bundle.sequence.logit(features(bundle, tokens))


def blocks_of(first, tokens):
    return list(range(first, first + -(-len(tokens) // BLOCK)))


TEXT = [int(i) for i in np.random.default_rng(1).integers(0, 50, 30)]


@pytest.mark.parametrize("pooling", POOLINGS, ids=lambda p: p.kind)
@pytest.mark.parametrize("replayed", [False, True])
@pytest.mark.parametrize("chunk", [30, 13, 4, 1])
def test_prompt_scores_the_same_in_any_chunks(pooling, replayed, chunk):
    bundle = make_bundle(pooling)
    engine, blocks, scores = Engine(bundle, replayed=replayed), blocks_of(3, TEXT), {}
    for begin in range(0, 30, chunk):
        assert scores == {}
        scores, _ = engine.step([(TEXT, blocks, begin, min(chunk, 30 - begin), 30)])
    assert scores == {"r0": pytest.approx(expected(bundle, TEXT), abs=1e-5)}


@pytest.mark.parametrize("pooling", POOLINGS, ids=lambda p: p.kind)
def test_cached_prefix_brings_its_scores_with_it_answers_included(pooling):
    bundle = make_bundle(pooling)
    engine, first = Engine(bundle), [9, 2, 30, 17, 8, 21, 5, 11]
    engine.step([(TEXT, first, 0, 10, 10)])
    for position in range(10, 24):  # the answer: one token a step, nobody waits for a verdict
        assert engine.step([(TEXT, first, position, 1, 10)]) == ({}, None)
    turn = [*TEXT[:24], 7, 7, 3]
    scores, _ = engine.step([(turn, [*first[:6], 33], 24, 3, 27)])
    assert scores == {"r0": pytest.approx(expected(bundle, turn), abs=1e-5)}


@pytest.mark.parametrize("pooling", POOLINGS, ids=lambda p: p.kind)
def test_prefix_that_is_computed_in_the_same_step_is_found_whatever_the_order(pooling):
    bundle, longer = make_bundle(pooling), [*TEXT[:8], 1, 2]
    for flip in (False, True):
        engine = Engine(bundle)
        work = [(TEXT, blocks_of(0, TEXT), 0, 30, 30), (longer, [0, 1, 20], 8, 2, 10)]
        scores, _ = engine.step(work[::-1] if flip else work)
        found = [scores["r1"], scores["r0"]] if flip else [scores["r0"], scores["r1"]]
        assert found == pytest.approx([expected(bundle, TEXT), expected(bundle, longer)], abs=1e-5)


@pytest.mark.parametrize("pooling", POOLINGS, ids=lambda p: p.kind)
def test_running_scores_are_those_of_the_answers_last_tokens(pooling):
    bundle = make_bundle(pooling)
    engine, blocks, seen = Engine(bundle), blocks_of(6, TEXT), []
    _, running = engine.step([(TEXT, blocks, 0, 12, 12)], watched=True)
    assert running.tolist() == [-np.inf]  # no token of an answer has been read yet
    for position in range(12, 30):
        seen += engine.step([(TEXT, blocks, position, 1, 12)], watched=True)[1].tolist()
    whole = bundle.sequence.running(features(bundle, TEXT))
    np.testing.assert_allclose(seen, whole[12:], atol=1e-5)
    # Recomputed after a preemption, in two chunks: the last token says the same again.
    _, running = engine.step([(TEXT, blocks_of(25, TEXT), 0, 20, 12)], watched=True)
    np.testing.assert_allclose(running, whole[[19]], atol=1e-5)
    _, running = engine.step([(TEXT, blocks_of(25, TEXT), 20, 10, 12)], watched=True)
    np.testing.assert_allclose(running, whole[[29]], atol=1e-5)


REQUEST = st.tuples(st.integers(0, 2), st.integers(1, 28), st.integers(0, 5), st.integers(1, 9))
"""Which text it shares a beginning with, tokens of its prompt, of its answer, and of its chunks."""


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(REQUEST, REQUEST, REQUEST), min_size=1, max_size=4), st.sampled_from(POOLINGS))
@pytest.mark.parametrize("replayed", [False, True])
def test_blocks_that_change_hands_never_mix_scores(replayed, waves, pooling):
    bundle = make_bundle(pooling)
    engine, rng = Engine(bundle, replayed=replayed), np.random.default_rng(5)
    texts = rng.integers(0, 50, (3, 40)).tolist()
    for wave in waves:
        free = rng.permutation(BLOCKS).tolist()  # blocks of the last wave are given away in any order
        live = []
        for kind, prompt, answer, chunk in wave:
            tokens = texts[kind][: prompt + answer]
            live.append([tokens, [free.pop() for _ in blocks_of(0, tokens)], 0, chunk, prompt])
        while any(len(tokens) > computed for tokens, _, computed, *_ in live):
            rows = [entry for entry in live if len(entry[0]) > entry[2]]
            work = []
            for tokens, blocks, computed, chunk, prompt in rows:
                todo = min(chunk, prompt - computed) if computed < prompt else 1
                work.append((tokens, blocks, computed, todo, prompt))
            scores, running = engine.step(work, watched=True)
            ended = {f"r{i}": w for i, w in enumerate(work) if w[2] < w[4] == w[2] + w[3]}
            assert scores.keys() == ended.keys()
            for name, (tokens, *_, prompt) in ended.items():
                assert scores[name] == pytest.approx(expected(bundle, tokens[:prompt]), abs=1e-4)
            for value, (tokens, _, computed, todo, prompt) in zip(running, work, strict=True):
                if computed + todo > prompt:
                    want = bundle.sequence.running(features(bundle, tokens[: computed + todo]))[-1]
                    assert value == pytest.approx(want, abs=1e-4)
            for entry, (*_, todo, _) in zip(rows, work, strict=True):
                entry[2] += todo


def test_slot_that_nobody_wrote_makes_a_score_no_number():
    bundle = make_bundle()
    engine = Engine(bundle)
    scores, _ = engine.step([(TEXT, blocks_of(0, TEXT), 12, 18, 30)])  # its beginning never came
    assert np.isnan(scores["r0"])


@pytest.mark.parametrize("pooling", POOLINGS, ids=lambda p: p.kind)
def test_layer_that_did_not_run_makes_a_score_no_number(pooling):
    bundle = make_bundle(pooling)
    engine = Engine(bundle)
    engine.step([(TEXT, blocks_of(0, TEXT), 0, 30, 30)])
    whole = engine.model
    engine.model = lambda x: [layer(x) for layer in whole.model.layers[:2]]
    scores, _ = engine.step([(TEXT, blocks_of(0, TEXT), 0, 30, 30)])
    assert np.isnan(scores["r0"])


@torch.no_grad()
@pytest.mark.parametrize("replayed", [False, True])
def test_dummy_runs_and_the_models_output_are_left_alone(replayed):
    bundle, plain = make_bundle(), Model()
    engine = Engine(bundle, replayed=replayed)
    engine.step([(TEXT, blocks_of(0, TEXT), 0, 20, 30)])
    x = torch.randn(TOKENS, HIDDEN)
    assert torch.equal(engine.model(x), plain(x))  # nobody staged it
    assert engine.taps.score() is None
    scores, _ = engine.step([(TEXT, blocks_of(0, TEXT), 20, 10, 30)])
    assert scores["r0"] == pytest.approx(expected(bundle, TEXT), abs=1e-5)


@pytest.mark.parametrize("sites", [SITES, tapped.FIRST_HALF], ids=["both", "one rank has none"])
def test_ranks_sum_their_shares(sites):
    bundle = make_bundle(POOLINGS[3], sites)
    shares = {}

    def keep(rank):
        def reduce(share):
            shares.setdefault(rank, []).append(share.clone())
            return share

        return reduce

    first, second = (Engine(bundle, ranks=2, rank=rank, all_reduce=keep(rank)) for rank in (0, 1))
    inputs = Reference(Model()).inputs(EMBEDDING[TEXT])
    for rank, engine in enumerate((first, second)):
        halves = {key: x.chunk(2, 1)[rank].contiguous() for key, x in inputs.items()}

        def fed(_, engine=engine, halves=halves):
            for i, layer in enumerate(engine.model_.model.layers):
                layer.mlp.down_proj(halves["mlp", i])
                layer.self_attn.o_proj(halves["attention", i])

        engine.model_, engine.model = engine.model, fed
        engine.step([(TEXT, blocks_of(0, TEXT), 0, 30, 30)])
    outputs = shares[0][0] + shares[1][0] + torch.from_numpy(bundle.sequence.bias)
    np.testing.assert_allclose(outputs, bundle.sequence.outputs(features(bundle, TEXT)), atol=1e-4)


def test_memory_is_what_is_allocated():
    engine = Engine(make_bundle(POOLINGS[3]))
    assert engine.taps.table_bytes == BLOCKS * BLOCK * 4 * 4
    assert engine.taps.bytes > len(SITES) * TOKENS * 4 * 4


def test_runner_that_does_not_say_where_tokens_lie_is_an_error():
    engine = Engine(make_bundle())
    engine.taps.begin()
    with pytest.raises(GuardStartupError, match="where the tokens"):
        engine.taps.stage(tapped.layout([(0, 3, 3)]))
