"""What a guard has to beat before its units have shown anything, fitted and tested like the guard itself.

Words alone (naive Bayes and logistic regression on n-grams), random units of the same layers, the whole
residual stream of one layer, the difference of its class means, and the prompt's token embeddings. Two that
need weights of their own are named and said to be missing.

With the prompts that the bundle was fitted on, all are fitted on those. Without, each is fitted on the
evaluation prompts themselves, by folds of whole sources: that flatters the baselines, never the guard.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import MultinomialNB
from sklearn.pipeline import make_pipeline

from guard.baselines import WORD_STRENGTH
from guard.bundle import Bundle
from guard.data import Dataset
from guard.evaluate import EvaluationError
from guard.evaluation import Evaluated
from guard.figures import Document, Scored, ranking
from guard.leave_out import choose_strength, source_folds
from guard.mlp_probe import HiddenLayer
from guard.observe import Observations, Subject
from guard.paired import differences
from guard.probe import LINEAR, BoolArray, Family, ProbeError, fit_probe
from guard.resample import Bootstrap
from guard.residual import mean_embeddings, read_residual
from guard.units import columns_within, random_like, union

DRAWS = 5
"""Random choices of units."""
FALLBACK = 1e-3
"""Inverse regularisation where it is not chosen by leaving sources out."""
NOT_MEASURED = {
    "sentence embeddings": "needs the weights of an embedding model, of which this project has none",
    "guard model": "needs the weights of a guard model, of which this project has none",
}
TRANSFORMERS = ("residual stream, one layer", "difference of means, one layer", "token embeddings")
Score = Callable[[Any], NDArray[Any]]


class Train(NamedTuple):
    """Prompts to fit on: what a baseline sees of them, the positives, and what folds are made by."""

    inputs: Any
    positive: BoolArray
    sources: NDArray[np.str_]
    harmful: BoolArray
    choose: bool = True
    """Whether to choose regularisation and layer by leaving sources out; else ``FALLBACK`` and the third of
    four layers are taken: folds within folds take hours on thousands of prompts."""


@dataclass(frozen=True)
class Baseline:
    """``read`` gives what it sees of prompts ``[n, …]``, ``learn`` a function from that to scores ``[n]``."""

    read: Callable[[Observations, str], Any]
    learn: Callable[[Train], Score]


def baselines(bundle: Bundle, subject: Subject) -> dict[str, Baseline]:
    """The protocol's, by the name of their row. The model is loaded when the first of them reads it."""
    card = bundle.card
    shape = subject.checkpoint.shape
    family: Family = HiddenLayer(bundle.scorer.hidden) if card.probe == "mlp" else LINEAR
    draws = [random_like(card.sites, shape, seed=seed) for seed in range(DRAWS)]
    # Of whole layers there is one choice alone, and it would be held against itself.
    draws = [] if all(draw == card.sites for draw in draws) else draws
    every = union(draws)
    # The layers that a reader of one stream would try first.
    layers = sorted({max(1, round(shape.layers * part)) for part in (0.25, 0.5, 0.75, 1.0)})
    kept: dict[int, NDArray[np.float32]] = {}

    def random_units(draw: int) -> Callable[[Observations, str], Any]:
        columns = columns_within(draws[draw], every, shape)
        return lambda seen, role: subject.features(seen.tokens, every, f"random units, {role}")[:, columns]

    def stream(seen: Observations, role: str) -> NDArray[np.float32]:
        if id(seen) not in kept:
            kept[id(seen)] = read_residual(subject.model, layers, seen.tokens, tokens=subject.batch_tokens)
        return kept[id(seen)]

    read_by_transformers = {
        "residual stream, one layer": Baseline(stream, _best_layer),
        "difference of means, one layer": Baseline(stream, _means),
        "token embeddings": Baseline(lambda seen, role: mean_embeddings(subject.model, seen.tokens), _probe),
    }
    texts = lambda seen, role: np.array([p.text for p in seen.prompts], dtype=object)  # noqa: E731
    return {
        "words (n-gram naive Bayes)": Baseline(texts, naive_bayes),
        "words (TF-IDF, logistic regression)": Baseline(texts, words),
        **{
            f"random units, draw {draw + 1}": Baseline(random_units(draw), partial(_probe, family=family))
            for draw in range(len(draws))
        },
        # The engine reads sites and nothing else.
        **(read_by_transformers if subject.reader is None else {}),
    }


def measure(
    bundle: Bundle,
    subject: Subject,
    evaluated: Evaluated,
    bootstrap: Bootstrap,
    fit: Dataset | None = None,
) -> tuple[Document, dict[str, Scored]]:
    """Rows of the table by name, and the scores of those that were measured, over the pooled prompts.

    ``fit`` are the prompts that the bundle was fitted on. Raises EvaluationError when they are others.
    """
    pool, seen = evaluated.pool, evaluated.seen
    if fit is not None:
        refuse_others(bundle, fit)
        observed = subject.observe(fit, judge="harmful" if bundle.card.label == "unsafe_output" else "none")
    document: Document = {}
    scores: dict[str, Scored] = {}
    guard_scores = evaluated.scored[pool]
    for name, baseline in baselines(bundle, subject).items():
        inputs = baseline.read(seen, "evaluate")
        if fit is None:
            found = _by_folds(baseline, inputs, seen)
        else:
            target = observed.target(bundle.card.label)
            read = baseline.read(observed, "fit")
            found = baseline.learn(Train(read, target, observed.sources, observed.harmful))(inputs)
        if found is None:
            document[name] = {"not_measured": "the evaluation prompts cannot be folded by source"}
            continue
        scored = Scored(
            np.asarray(found)[pool], guard_scores.positive, guard_scores.sources, guard_scores.requests
        )
        entry = ranking(scored, bootstrap)
        against = differences(scored, guard_scores.scores, bootstrap)
        if against is not None:
            # The guard minus the baseline, on the same resamples.
            entry["auroc_difference"] = against["auroc"]["difference"]
            entry["auroc_difference_interval"] = against["auroc"]["difference_interval"]
            for key in ("difference", "difference_interval"):
                entry[f"tpr_at_fpr_{key}"] = {rate: each[key] for rate, each in against["tpr_at_fpr"].items()}
        entry["fitted_on"] = "the fit prompts" if fit else "the evaluation prompts, other sources"
        document[name] = entry
        scores[name] = scored
    if not any(name.startswith("random units") for name in document):
        document["random units"] = {"not_measured": "the bundle takes whole layers: there is no other choice"}
    for name in () if subject.reader is None else TRANSFORMERS:
        document[name] = {"not_measured": "is read by transformers, and the engine ran the model"}
    return {**document, **{name: {"not_measured": why} for name, why in NOT_MEASURED.items()}}, scores


def refuse_others(bundle: Bundle, fit: Dataset) -> None:
    """Raises EvaluationError unless ``fit`` is made of the very files that ``bundle`` was fitted on."""
    known = {file.sha256: file.name for file in bundle.card.data if file.role in ("fit", "hard_negative")}
    given = {file.sha256: file.name for file in fit.files}
    strange = sorted(given[digest] for digest in given.keys() - known.keys())
    missing = sorted(known[digest] for digest in known.keys() - given.keys())
    if strange or missing:
        raise EvaluationError(
            "baselines are fitted on what the bundle was fitted on: "
            + "; ".join(
                f"{what} {', '.join(names)}"
                for what, names in (("it was not fitted on", strange), ("it was also fitted on", missing))
                if names
            )
        )


def drawn(scores: Mapping[str, Scored]) -> dict[str, Scored]:
    """The curves worth drawing beside the guard's: one of the random choices stands for all."""
    shown = ("words (TF-IDF, logistic regression)", "random units, draw 1", "residual stream, one layer")
    return {name: scores[name] for name in shown if name in scores}


def _by_folds(baseline: Baseline, inputs: Any, seen: Observations) -> NDArray[np.float64] | None:
    folds = source_folds(seen.sources, seen.harmful)
    if folds is None:
        return None
    found = np.empty(len(folds))
    for fold in np.unique(folds):
        here = folds == fold
        train = Train(
            inputs[~here], seen.harmful[~here], seen.sources[~here], seen.harmful[~here], choose=False
        )
        scores = np.asarray(baseline.learn(train)(inputs[here]), dtype=np.float64)
        # Folds are fitted apart: benign scores of each are put on one scale before they are ranked together.
        benign = scores[~seen.harmful[here]]
        found[here] = (scores - benign.mean()) / (benign.std() or 1.0)
    return found


def naive_bayes(train: Train) -> Score:
    """Log-odds of naive Bayes over word 1- and 2-grams; ``train.inputs`` are texts ``[n]``."""
    model = make_pipeline(CountVectorizer(ngram_range=(1, 2)), MultinomialNB(fit_prior=False))
    model.fit(train.inputs, train.positive)

    def score(texts: Any) -> NDArray[Any]:
        log = model.predict_log_proba(texts)
        return np.asarray(log[:, 1] - log[:, 0])

    return score


def words(train: Train) -> Score:
    """Logits of a logistic regression on TF-IDF weighted word 1- and 2-grams of texts ``[n]``."""
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
        LogisticRegression(C=WORD_STRENGTH, class_weight="balanced", max_iter=5000),
    )
    model.fit(train.inputs, train.positive)
    return lambda texts: np.asarray(model.decision_function(texts))


def _chosen(train: Train, inputs: Any, family: Family) -> tuple[float, float]:
    """A strength, and how well it ranks sources it was not fitted on."""
    if not train.choose:
        return FALLBACK, 0.0
    try:
        choice = choose_strength(inputs, train.positive, train.sources, train.harmful, family=family)
    except ProbeError:
        return FALLBACK, 0.0
    return choice.strength, choice.scores[choice.strength]


def _probe(train: Train, family: Family = LINEAR) -> Score:
    strength, _ = _chosen(train, train.inputs, family)
    return fit_probe(train.inputs, train.positive, strength=strength, family=family).logits


def _best_layer(train: Train) -> Score:
    """The layer and the strength that rank left-out sources best."""
    choices = [_chosen(train, train.inputs[:, i], LINEAR) for i in range(train.inputs.shape[1])]
    # Where nothing was chosen all are equal, and the deeper of the middle ones is taken.
    best = max(range(len(choices)), key=lambda i: (choices[i][1], i == len(choices) // 2))
    probe = fit_probe(train.inputs[:, best], train.positive, strength=choices[best][0])
    return lambda inputs: probe.logits(inputs[:, best])


def _means(train: Train) -> Score:
    """The layer whose means are furthest apart in units of the spread along the line between them."""
    directions, apart = [], []
    for i in range(train.inputs.shape[1]):
        layer = train.inputs[:, i].astype(np.float64)
        direction = layer[train.positive].mean(0) - layer[~train.positive].mean(0)
        along = layer @ direction
        spread = np.sqrt((along[train.positive].var() + along[~train.positive].var()) / 2) or 1.0
        directions.append(direction)
        apart.append((along[train.positive].mean() - along[~train.positive].mean()) / spread)
    best = int(np.argmax(apart))
    return lambda inputs: np.asarray(inputs[:, best].astype(np.float64) @ directions[best])
