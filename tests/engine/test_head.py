"""The probe on the device: its logits, and its share on each of several ranks."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from guard.bundle import Site
from guard.scorer import ProbeKind
from tests.engine import tapped
from tests.engine.tapped import Model, Reference, make, step

pytestmark = [  # vLLM and its dependencies warn a lot
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error:::guard"),
]
KINDS: tuple[ProbeKind, ...] = ("linear", "mlp", "product")
SPANS = tapped.SPANS


def head(kind: ProbeKind, positions: list[int] | None = None, **options: Any) -> Any:
    from guard.engine.head import ProbeHead

    made = tapped.bundle(kind)
    chosen = {"max_requests": 5, "dtype": torch.float32, "device": torch.device("cpu"), **options}
    return ProbeHead(
        made.scorer, list(range(made.card.features)) if positions is None else positions, **chosen
    )


def features(count: int) -> Tensor:
    return torch.randn(count, tapped.bundle().card.features, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_scorer(kind: ProbeKind, count: int) -> None:
    x = features(count)
    found = head(kind).logits(x)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), tapped.bundle(kind).logits(x.numpy()), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_taken_in_the_order_in_which_the_rank_holds_them(kind: ProbeKind) -> None:
    x = features(3)
    order = list(reversed(range(x.shape[1])))
    found = head(kind, order).logits(x[:, order])
    np.testing.assert_allclose(found.numpy(), tapped.bundle(kind).logits(x.numpy()), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_short_features_are_converted_and_not_the_probe(kind: ProbeKind) -> None:
    x = features(3).bfloat16()
    found = head(kind, dtype=torch.bfloat16).logits(x)
    np.testing.assert_allclose(found.numpy(), tapped.bundle(kind).logits(x.float().numpy()), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_does_not_see_the_one_before(kind: ProbeKind) -> None:
    probe, x = head(kind), features(5)
    alone = head(kind).logits(x[:2]).clone()
    probe.logits(torch.full_like(x, torch.nan))
    assert torch.equal(probe.logits(x[:2]), alone)


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_are_summed_before_bias_and_hidden_layer(kind: ProbeKind) -> None:
    x, parts = features(4), []
    odd, even = list(range(1, x.shape[1], 2)), list(range(0, x.shape[1], 2))

    def keep(part: Tensor) -> Tensor:
        parts.append(part.clone())
        return part

    head(kind, odd, all_reduce=keep).logits(x[:, odd])
    found = head(kind, even, all_reduce=lambda part: part + parts[0]).logits(x[:, even])
    np.testing.assert_allclose(found.numpy(), tapped.bundle(kind).logits(x.numpy()), atol=1e-5)


class Group:
    """An all-reduce between threads; like vLLM's, it may return another tensor than it was given."""

    def __init__(self, ranks: int) -> None:
        self._parts: list[Tensor] = [torch.empty(0)] * ranks
        self._barrier = threading.Barrier(ranks, timeout=30)

    def all_reduce(self, rank: int, part: Tensor) -> Tensor:
        self._parts[rank] = part.clone()
        self._barrier.wait()
        total = torch.stack(self._parts).sum(0)
        self._barrier.wait()
        return total


@pytest.mark.parametrize("sites", [tapped.SITES, tapped.FIRST_HALF], ids=["both", "one holds none"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("replayed", [False, True])
def test_two_ranks_together_score_what_one_does(
    replayed: bool, kind: ProbeKind, sites: tuple[Site, ...]
) -> None:
    made, group = tapped.bundle(kind, sites), Group(2)
    reference, found = Reference(Model()), [[], []]
    steps = [SPANS, [(0, 2, 2)], [(5, 1, 3)], SPANS]

    def run(rank: int) -> None:
        model = Model(ranks=2, rank=rank)
        taps = make(
            model, made, replayed=replayed, rank=rank, all_reduce=lambda part: group.all_reduce(rank, part)
        )

        def forward(inputs: dict[tuple[str, int], Tensor]) -> None:
            for (kind, i), x in inputs.items():
                layer = model.model.layers[i]
                half = x.shape[-1] // 2
                module = layer.mlp.down_proj if kind == "mlp" else layer.self_attn.o_proj
                module(x[:, rank * half : (rank + 1) * half])

        for seed, spans in enumerate(steps):
            found[rank].append(step(taps, forward, spans, inputs[seed]))

    inputs = [reference.inputs(tapped.rows(spans, seed)) for seed, spans in enumerate(steps)]
    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    expected = [reference.logits(made, tapped.rows(spans, seed), spans) for seed, spans in enumerate(steps)]
    for of_rank in found:
        assert len(of_rank) == len(expected)
        for logits, wanted in zip(of_rank, expected, strict=True):
            assert logits == pytest.approx(wanted, abs=1e-5)
