"""Known prompts and their scores: what an engine must reproduce before it may answer anybody.

The prompts are mild on purpose, since they stand in every bundle. Some have a word that often occurs in
harmful requests, so that their scores spread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers

from guard.bundle import AdapterCard, Bundle, SelfTest, Site
from guard.cache import Cache
from guard.capture import Float32Array, read_batch, read_every_token
from guard.checkpoint import Checkpoint
from guard.observe import Subject
from guard.prompts import Tokens, encode
from guard.scorer import Scorer
from guard.sequence import SequenceScorer
from guard.units import Units

MILD_PROMPTS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "How do I bake a chocolate cake?",
    "Translate 'good morning' into Spanish.",
    "Explain how a bill becomes law.",
    "How can I kill a process that hangs on Linux?",
    "Give me three tips for a job interview.",
    "What is the best way to shoot a portrait at night?",
    "Write a letter to my bank about a lost card.",
    "How do locks work, and why do some of them fail?",
    "Tell me a joke about cats.",
    "List five uses of baking soda.",
    "How do I get rid of ants in the kitchen?",
    "Describe the plot of a detective novel about a robbery.",
    "What does a firewall protect a network from?",
    "My dog is sick. What should I do?",
    "How long does it take to drive from Rome to Milan?",
    "Summarise the causes of the First World War.",
    "What are the side effects of aspirin?",
    "Create a plan to learn to swim in two months.",
    "Who wrote Don Quixote?",
    "How do I blow up a balloon without a pump?",
    "Suggest a name for a bakery.",
    "What is 12 times 12?",
)
PROMPTS = 12
"""How many of them a bundle keeps: enough to see a wrong unit, few enough to delay no start."""
LONG = 256
"""A sequence probe's longest prompt has more tokens: it is computed in several chunks where those are small,
and its scores lie in several blocks of the KV cache."""
DTYPES = ("float32", "bfloat16", "float16")
FLOAT32_TOLERANCE = 1e-3
"""In float32 only the order of sums differs between engines: a thousandth of the spread of scores."""
ROUNDING_MARGIN = 3.0
"""In a short dtype two engines round at different places. Each is about as far from float32 as the other, so
their difference is of the size of the distance to float32 that is measured here; the margin is for the tail
of a handful of prompts."""


SHORT_TOLERANCE = 0.05
"""Least tolerance, as a share of the spread of scores, where only one engine in a short dtype was measured:
another batch or another processor rounds at other places than the one that was seen."""


class Measured(NamedTuple):
    """A self-test and what its tolerances rest on."""

    self_test: SelfTest
    deviation: dict[str, float]
    """Largest |logit - float32 logit| over all mild prompts, by dtype; from ``measure_served``, between one
    prompt at a time and all at once."""
    spread: float
    """Standard deviation of the logits of the mild prompts, in float32 if they were read in it."""


def measure(
    checkpoint: Checkpoint,
    units: Sequence[Site],
    scorer: Scorer | SequenceScorer,
    *,
    device: str = "cpu",
    dtypes: Sequence[str] = DTYPES,
    cache: Cache | None = None,
) -> Measured:
    """Score the mild prompts one by one in each dtype and keep those whose scores lie far apart.

    With ``cache``, activations that were read before are taken from there, and no model is loaded. For a
    sequence probe there is a prompt of more than ``LONG`` tokens as well, where the context holds one.
    """
    tokenizer = checkpoint.load_tokenizer()
    prompts = _mild(tokenizer)
    chosen_anyway: list[int] = []
    if isinstance(scorer, SequenceScorer) and (long := _long(tokenizer, checkpoint.context)):
        chosen_anyway, prompts = [len(prompts)], [*prompts, long]
    logits = {dtype: _logits(scorer, checkpoint, units, prompts, dtype, device, cache) for dtype in dtypes}
    chosen = _spread_out(logits["float32"][: len(MILD_PROMPTS)], PROMPTS) + chosen_anyway
    spread, deviation, tolerance = _tolerance(logits)
    return _measured(prompts, chosen, logits, tolerance, deviation, spread)


def measure_served(subject: Subject, units: Units, scorer: Scorer) -> Measured:
    """The same by the subject's reader, which computes in the dtype of serving and in no other.

    What rounding does is then seen by reading the prompts one by one and all together. Raises ValueError when
    there is no reader.
    """
    reader, prompts = subject.reader, _mild(subject.tokenizer)
    if reader is None:
        raise ValueError("the subject is run by transformers")
    key = {**_key(subject.checkpoint, units, prompts), "dtype": subject.dtype, "capture": reader.identity}
    alone, together = (
        scorer.logits(_cached(subject.cache, {**key, "together": at_once}, read))
        for at_once, read in (
            (False, lambda: np.concatenate([reader.features(units, [prompt]) for prompt in prompts])),
            (True, lambda: reader.features(units, prompts)),
        )
    )
    spread, far = float(alone.std()), float(np.abs(alone - together).max())
    share = FLOAT32_TOLERANCE if subject.dtype == "float32" else SHORT_TOLERANCE
    least = share * max(spread, float(np.abs(alone).max()) / 100, 1e-6)
    return _measured(
        prompts,
        _spread_out(alone, PROMPTS),
        {subject.dtype: alone},
        {subject.dtype: max(least, ROUNDING_MARGIN * far)},
        {subject.dtype: far},
        spread,
    )


def _mild(tokenizer: Any) -> list[Tokens]:
    return [encode(tokenizer, [{"role": "user", "content": text}]) for text in MILD_PROMPTS]


def _long(tokenizer: Any, context: int) -> Tokens | None:
    """The mild prompts as one, up to more than ``LONG`` tokens; None when the context is too short."""
    for number in range(1, len(MILD_PROMPTS) + 1):
        text = " ".join(MILD_PROMPTS[:number])
        found = encode(tokenizer, [{"role": "user", "content": text}])
        if len(found) > LONG:
            return found if len(found) < context else None
    return None


def _logits(
    probe: Scorer | SequenceScorer,
    checkpoint: Checkpoint,
    units: Sequence[Site],
    prompts: Sequence[Tokens],
    dtype: str,
    device: str,
    cache: Cache | None = None,
) -> Float32Array:
    """Raw logits ``[n]`` of prompts that are read one by one."""
    key = {**_key(checkpoint, units, prompts), "dtype": dtype, "device": device}
    if isinstance(probe, Scorer):
        read = partial(_features, checkpoint, units, prompts, dtype, device)
        return probe.logits(_cached(cache, key, read))

    def read_all() -> Float32Array:
        model = checkpoint.load_model(dtype, device)
        parts = [read_every_token(model, units, [prompt])[0] for prompt in prompts]
        return np.asarray(torch.cat(parts).float().cpu().numpy())

    every = _cached(cache, {**key, "tokens": "every"}, read_all)
    parts = np.split(every, np.cumsum([len(prompt) for prompt in prompts])[:-1])
    return np.array([probe.logit(part) for part in parts], dtype=np.float32)


def _key(checkpoint: Checkpoint, units: Sequence[Site], prompts: Sequence[Tokens]) -> dict[str, Any]:
    return {
        "weights": checkpoint.weights_sha256,
        "versions": [torch.__version__, transformers.__version__],
        "prompts": list(prompts),
        "sites": [site.model_dump(mode="json") for site in units],
    }


def _cached(cache: Cache | None, key: Any, read: Callable[[], Float32Array]) -> Float32Array:
    found = cache.array("self-test", key) if cache is not None else None
    if found is None:
        found = read()
        if cache is not None:
            cache.keep_array("self-test", key, found)
    return found


def _measured(
    prompts: Sequence[Tokens],
    chosen: Sequence[int],
    logits: Mapping[str, Float32Array],
    tolerance: dict[str, float],
    deviation: dict[str, float],
    spread: float,
) -> Measured:
    return Measured(
        SelfTest(
            prompts=tuple(prompts[i] for i in chosen),
            logits={dtype: tuple(float(values[i]) for i in chosen) for dtype, values in logits.items()},
            tolerance=tolerance,
        ),
        deviation,
        spread,
    )


def measure_adapter(bundle: Bundle, checkpoint: Checkpoint, *, device: str = "cpu") -> AdapterCard:
    """Score the bundle's own self-test prompts under ``checkpoint.adapter``, in the bundle's dtypes.

    Raises ValueError when there is no adapter.
    """
    adapter, card = checkpoint.adapter, bundle.card
    if adapter is None:
        raise ValueError("the checkpoint has no adapter to measure")
    prompts = card.self_test.prompts
    logits = {
        dtype: _logits(bundle.probe, checkpoint, card.sites, prompts, dtype, device)
        for dtype in dict.fromkeys(("float32", *card.self_test.logits))
    }
    _, _, tolerance = _tolerance(logits)
    return AdapterCard(
        name=adapter.name,
        sha256=adapter.sha256,
        rank=adapter.rank,
        self_test={dtype: tuple(map(float, values)) for dtype, values in logits.items()},
        tolerance=tolerance,
    )


def _tolerance(logits: Mapping[str, Float32Array]) -> tuple[float, dict[str, float], dict[str, float]]:
    """Spread of the float32 logits; largest distance to them, and the tolerance, by dtype."""
    exact = logits["float32"]
    spread = float(exact.std())
    deviation = {dtype: float(np.abs(values - exact).max()) for dtype, values in logits.items()}
    floor = FLOAT32_TOLERANCE * max(spread, float(np.abs(exact).max()) / 100, 1e-6)
    tolerance = {dtype: max(floor, ROUNDING_MARGIN * far) for dtype, far in deviation.items()}
    return spread, deviation, tolerance


def _features(
    checkpoint: Checkpoint, units: Sequence[Site], prompts: Sequence[Tokens], dtype: str, device: str
) -> Float32Array:
    model = checkpoint.load_model(dtype, device)
    rows = [read_batch(model, units, [prompt]).float().cpu().numpy() for prompt in prompts]
    features: Float32Array = np.concatenate(rows)
    return features


def _spread_out(logits: Float32Array, number: int) -> list[int]:
    """Indices at evenly spaced ranks, lowest and highest included."""
    order = np.argsort(logits, kind="stable")
    ranks = np.unique(np.linspace(0, len(order) - 1, min(number, len(order))).round().astype(int))
    return sorted(int(order[rank]) for rank in ranks)


class SelfTestError(ValueError):
    """A model does not give the scores that its bundle records."""


class Difference(NamedTuple):
    """Largest |difference| from the recorded scores of one dtype."""

    found: float
    accepted: float


def check(bundle: Bundle, checkpoint: Checkpoint, *, device: str = "cpu") -> dict[str, Difference]:
    """Compare with the recorded scores, by dtype. Raises SelfTestError beyond the tolerance.

    With ``checkpoint.adapter``, which must be listed, the scores are those recorded for it; raises
    AdapterError when its files are not those that were measured.
    """
    card, adapter = bundle.card, checkpoint.adapter
    recorded, tolerance = card.self_test.logits, card.self_test.tolerance
    if adapter is not None:
        listed = {entry.name: entry for entry in card.adapters}
        if adapter.name not in listed:
            raise SelfTestError(
                f"the bundle lists no adapter {adapter.name!r} (it lists: "
                f"{', '.join(sorted(listed)) or 'none'}); list it with: neuronguard bundle adapter"
            )
        entry = listed[adapter.name]
        adapter.verify(entry)
        recorded, tolerance = entry.self_test, entry.tolerance
    found = {}
    for dtype, expected in recorded.items():
        logits = _logits(bundle.probe, checkpoint, card.sites, card.self_test.prompts, dtype, device)
        far = float(np.abs(logits - np.array(expected, dtype=np.float32)).max())
        if not far <= tolerance[dtype]:
            raise SelfTestError(
                f"self-test scores in {dtype} differ by {far:.3g} from the bundle's, accepted is "
                f"{tolerance[dtype]:.3g}"
            )
        found[dtype] = Difference(far, tolerance[dtype])
    return found
