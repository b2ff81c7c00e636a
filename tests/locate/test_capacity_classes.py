from __future__ import annotations

import numpy as np
import pytest

from guard.locate.capacity_classes import Edges, classify, edges, normalised, transitions
from guard.locate.capacity_options import KINDS, CapacityOptions
from guard.locate.errors import LocateError

QUARTERS = CapacityOptions(scu_share=0.25, ucu_share=0.25, ru_share=0.25)


@pytest.mark.parametrize("how", ["none", "layer_z", "layer_rank"])
def test_classes_are_the_same_under_every_normalisation_of_a_clear_case(how: str) -> None:
    safe = normalised({"mlp": np.array([[3.0, 0.5, 3.0, 0.0]])}, how)
    useful = normalised({"mlp": np.array([[0.5, 3.0, 3.0, 0.0]])}, how)
    classes = classify(safe, useful, edges(safe, useful, QUARTERS))
    assert [KINDS[kind] for kind in classes["mlp"][0]] == ["scu", "ucu", "cu", "ru"]


def test_normalised_scores_compare_within_a_layer() -> None:
    raw = {
        "mlp": np.array([[1.0, 3.0, 3.0, 9.0], [10.0, 30.0, 30.0, 90.0], [2.0, 2.0, 2.0, 2.0], [np.nan] * 4])
    }
    z, rank = normalised(raw, "layer_z")["mlp"], normalised(raw, "layer_rank")["mlp"]
    np.testing.assert_allclose(z[0], z[1])
    np.testing.assert_allclose((z[0].mean(), z[0].std()), (0, 1), atol=1e-12)
    assert z[2].tolist() == [0] * 4
    assert rank[:3].tolist() == [[0, 0.5, 0.5, 1]] * 2 + [[0.5] * 4]
    assert np.isnan(z[3]).all()
    assert np.isnan(rank[3]).all()
    assert normalised(raw, "none")["mlp"][0].tolist() == [1, 3, 3, 9]


def test_classes_have_their_shares_and_absent_units_none() -> None:
    random = np.random.default_rng(0)
    safe, useful = ({"mlp": random.random((5, 40)), "attention": random.random((5, 8))} for _ in range(2))
    safe["mlp"][0], useful["mlp"][0] = np.nan, np.nan
    options = CapacityOptions(scu_share=0.1, ucu_share=0.2, ru_share=0.3)
    classes = classify(safe, useful, edges(safe, useful, options))
    pooled = np.concatenate([part.ravel() for part in classes.values()])
    counts = {kind: int((pooled == index).sum()) for index, kind in enumerate(KINDS)}
    assert counts == {"scu": 20, "ucu": 40, "cu": 80, "ru": 60}
    assert (classes["mlp"][0] == -1).all()


def test_a_class_of_no_units_is_empty() -> None:
    random = np.random.default_rng(0)
    safe, useful = ({"mlp": random.random((2, 8))} for _ in range(2))
    at = edges(safe, useful, CapacityOptions(scu_share=0, ucu_share=0, ru_share=0))
    assert (classify(safe, useful, at)["mlp"] == KINDS.index("cu")).all()


def test_transitions_count_what_went_where() -> None:
    safe, useful = {"mlp": np.array([[3.0, 0.0, 1.0]])}, {"mlp": np.array([[0.0, 3.0, 1.0]])}
    at = Edges(scu=2, ucu=-2, ru=-np.inf)
    before, after = classify(safe, useful, at), classify({"mlp": np.zeros((1, 3))}, useful, at)
    scu, ucu, cu = (KINDS.index(kind) for kind in ("scu", "ucu", "cu"))
    table = transitions(before, after)
    assert (table[scu, cu], table[ucu, ucu], table[cu, cu], table.sum()) == (1, 1, 1, 3)
    with pytest.raises(LocateError, match="different shape"):
        transitions(before, {"mlp": np.zeros((2, 3), dtype=np.int8)})
