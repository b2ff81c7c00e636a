from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from guard.bundle import Bundle, BundleError
from guard.scorer import Scorer, ScorerError
from tests.guard import worlds

WEIGHT = np.array([[1.0, -1.0], [2.0, 0.5], [-1.0, -1.0]], dtype=np.float32)
BIAS = np.array([0.0, -1.0, 0.5], dtype=np.float32)
READOUT = np.array([1.0, -2.0, 4.0], dtype=np.float32)


def network() -> Scorer:
    return Scorer(WEIGHT, BIAS, READOUT, 0.25)


def test_a_linear_probe_is_its_one_row() -> None:
    scorer = Scorer.linear(np.array([2.0, -3.0], dtype=np.float32), 0.5)
    assert (scorer.kind, scorer.hidden, scorer.features) == ("linear", 1, 2)
    found = scorer.logits(np.array([[1, 1], [0, 2]], dtype=np.float32))
    assert found.dtype == np.float32
    assert found.tolist() == [-0.5, -5.5]


@pytest.mark.parametrize("scorer_of", [Scorer.linear, None])
def test_equal_activations_have_equal_logits_however_they_lie_in_memory(scorer_of: Any) -> None:
    random = np.random.default_rng(0)
    features = random.standard_normal((257, 1536)).astype(np.float32)
    weight = random.standard_normal((8, 1536)).astype(np.float32)
    scorer = (
        Scorer.linear(weight[0], 0.5)
        if scorer_of
        else Scorer(weight, weight[:, 0].copy(), weight[0, :8].copy(), 0.0)
    )
    assert np.array_equal(scorer.logits(features), scorer.logits(np.asfortranarray(features)))


def test_a_hidden_layer_lets_through_what_is_positive() -> None:
    scorer = network()
    assert (scorer.kind, scorer.hidden, scorer.features) == ("mlp", 3, 2)
    # (3, 1): hidden 2, 5.5, 0 (−3.5 cut off); (−1, −1): hidden 0, 0 (−3.5 cut off), 2.5.
    found = scorer.logits(np.array([[3, 1], [-1, -1]], dtype=np.float32))
    assert found.dtype == np.float32
    assert found.tolist() == [2 - 11 + 0.25, 10 + 0.25]


def test_a_product_has_the_probability_of_both() -> None:
    scorer = Scorer(WEIGHT[:2], BIAS[:2], product=True)
    assert (scorer.kind, scorer.hidden, scorer.features) == ("product", 2, 2)
    x = np.array([[3, 1], [-1, -1], [0.5, 4], [20, 0]], dtype=np.float32)
    found = scorer.logits(x)
    assert found.dtype == np.float32
    u, v = (x @ WEIGHT[:2].T + BIAS[:2]).astype(np.float64).T
    both = 1 / (1 + np.exp(-u)) / (1 + np.exp(-v))
    np.testing.assert_allclose(1 / (1 + np.exp(-found.astype(np.float64))), both, rtol=1e-5)
    far = scorer.logits(np.array([[300, -300], [-300, 300], [3000, 0], [-3000, 0]], dtype=np.float32))
    # The smaller of the two; where both are unlikely, their sum.
    np.testing.assert_allclose(far, [449, -1051, 3000, -9001], atol=2)


def test_a_bundle_keeps_a_product_and_its_digest_covers_both_probes(tmp_path: Path) -> None:
    plain = worlds.bundle().card
    random = np.random.default_rng(0)
    scorer = Scorer(*(random.standard_normal(s, dtype=np.float32) for s in ((2, 10), 2)), product=True)
    bundle = Bundle(plain.model_copy(update={"probe": "product"}), scorer)
    loaded = Bundle.load(bundle.save(tmp_path / "b"))
    assert loaded.digest == bundle.digest
    x = random.standard_normal((4, 10), dtype=np.float32)
    np.testing.assert_array_equal(loaded.logits(x), bundle.logits(x))
    turned = Scorer(scorer.weight[::-1].copy(), scorer.bias, product=True)
    assert Bundle(bundle.card, turned).digest != bundle.digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"product": True}, "a product of two probes has no hidden layer"),
        ({"product": True, "readout": None}, "product probe with 3 rows of weights, expected 2"),
        ({"weight": WEIGHT[0]}, r"weight is float32\[2\]"),
        ({"weight": WEIGHT.astype(np.float64)}, r"weight is float64\[3, 2\]"),
        ({"bias": BIAS[:2]}, r"bias is float32\[2\], expected float32\[3\]"),
        ({"readout": READOUT[None]}, r"readout is float32\[1, 3\], expected float32\[3\]"),
        ({"readout": None}, "linear probe with 3 rows of weights, expected 1"),
        ({"weight": np.zeros((257, 2), np.float32)}, "mlp probe with 257 rows of weights, expected 1 to 256"),
        ({"weight": np.zeros((0, 2), np.float32)}, "with 0 rows"),
        ({"bias": np.array([0, np.nan, 0], np.float32)}, "not finite"),
        ({"readout": np.array([0, np.inf, 0], np.float32)}, "not finite"),
        ({"weight": np.full((3, 2), np.inf, np.float32)}, "not finite"),
        ({"readout_bias": float("nan")}, "not finite"),
        # Finite as a double, not as it is stored.
        ({"readout_bias": 1e39}, "not finite"),
    ],
)
def test_arrays_that_make_no_probe_are_refused(change: dict[str, Any], message: str) -> None:
    parts = {"weight": WEIGHT, "bias": BIAS, "readout": READOUT, "readout_bias": 0.25}
    Scorer(**parts)  # type: ignore[arg-type]
    with pytest.raises(ScorerError, match=message):
        Scorer(**{**parts, **change})


@pytest.mark.parametrize("hidden", [1, 3, 256])
def test_a_bundle_keeps_a_hidden_layer_bit_for_bit(tmp_path: Path, hidden: int) -> None:
    bundle = worlds.mlp_bundle(hidden)
    loaded = Bundle.load(bundle.save(tmp_path / "b"))
    assert loaded.card.probe == "mlp"
    assert loaded.scorer.hidden == hidden
    assert {k: v.tobytes() for k, v in loaded.scorer.arrays().items()} == {
        k: v.tobytes() for k, v in bundle.scorer.arrays().items()
    }
    assert loaded.digest == bundle.digest


def test_the_digest_covers_every_array_of_a_hidden_layer() -> None:
    bundle = worlds.mlp_bundle(3)
    parts = bundle.scorer.arrays()
    digests = {bundle.digest}
    for name in parts:
        changed = {**parts, name: parts[name] + np.float32(0.5)}
        digests.add(Bundle(bundle.card, Scorer.of_arrays("mlp", changed)).digest)
    assert len(digests) == 5


def test_a_transposed_array_is_saved_in_the_order_it_is_read(tmp_path: Path) -> None:
    bundle = worlds.mlp_bundle(3)
    scorer = bundle.scorer
    turned = Scorer(np.asfortranarray(scorer.weight), scorer.bias, scorer.readout, scorer.readout_bias)
    saved = Bundle(bundle.card, turned)
    assert saved.digest == bundle.digest
    np.testing.assert_array_equal(Bundle.load(saved.save(tmp_path / "b")).scorer.weight, scorer.weight)


def test_card_and_arrays_must_be_of_one_kind(tmp_path: Path) -> None:
    linear, network = worlds.bundle(), worlds.mlp_bundle(3)
    with pytest.raises(BundleError, match="card says 'linear', but the probe is 'mlp'"):
        Bundle(linear.card, network.scorer)
    save_file(network.scorer.arrays(), linear.save(tmp_path / "a") / "guard.safetensors")
    with pytest.raises(BundleError, match=r"card says 'linear', but .* hold probe\.hidden\.bias"):
        Bundle.load(tmp_path / "a")
    save_file(linear.scorer.arrays(), network.save(tmp_path / "b") / "guard.safetensors")
    with pytest.raises(BundleError, match=r"card says 'mlp', but .* lack probe\.hidden\.bias"):
        Bundle.load(tmp_path / "b")


def test_a_probe_for_other_features_is_refused() -> None:
    with pytest.raises(BundleError, match=r"float32\[2\] a row, expected float32\[10\]"):
        Bundle(worlds.mlp_bundle(3).card, network())
