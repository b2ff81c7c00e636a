"""Safety neurons by activation contrast (Chen et al., arXiv 2406.14144, section 2).

A neuron's change score is the root mean square, over tokens of all prompts pooled, of the difference between
its activations in two twins that read the same text: prompts, and one twin's greedy answers to them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from tqdm import tqdm

from guard.cache import Cache
from guard.capture import batches
from guard.checkpoint import Checkpoint
from guard.data import Dataset
from guard.locate import templates
from guard.locate.change import STATISTICS, Positions, Sums, Text, add_texts, compared, finish
from guard.locate.decoding import check_prompts, greedy
from guard.locate.errors import LocateError
from guard.locate.hooks import Place
from guard.locate.passes import Cost
from guard.locate.results import Scores, unit_set, versions
from guard.locate.templates import Template
from guard.locate.twins import Twin, check_twins, folded_twins
from guard.locate.unit_set import BoolArray, Component, Float64Array, UnitSet, UnitSetError, top
from guard.prompts import Tokens
from guard.sites import shape_of

Source = Literal["recipient", "donor"]
CHUNK = 32
"""Prompts whose sums are kept as one entry of the cache: what an interrupted run loses at most."""


@dataclass(frozen=True)
class ContrastOptions:
    """How change scores are taken and units selected. Raises LocateError."""

    positions: Positions = "predicting"
    """Which tokens are compared: those that predict the answer, the answer's own, the last of the prompt, or
    all of the prompt. Prompt positions need no answers."""
    generate_with: Source = "recipient"
    """Which twin writes the answers that both read."""
    new_tokens: int = 256
    """Longest answer, in tokens."""
    exclude_last_n: int = 1
    """Last layers whose neurons are no candidates."""
    fraction: float = 0.05
    """Share of the candidates to select, by score over all layers together."""
    count: int | None = None
    """Number of units to select, in place of the share."""
    template: Template = "chat"
    """``chat``: the model's own; ``tulu``: the paper's; ``query``: another one's; ``none``: the bare text."""

    def __post_init__(self) -> None:
        if self.positions not in get_args(Positions):
            raise LocateError(f"positions is {self.positions!r}, expected one of {get_args(Positions)}")
        if self.generate_with not in get_args(Source):
            raise LocateError(f"generate_with is {self.generate_with!r}, expected one of {get_args(Source)}")
        if self.template not in get_args(Template):
            raise LocateError(f"template is {self.template!r}, expected one of {get_args(Template)}")
        if not 0.0 < self.fraction <= 1.0:
            raise LocateError(f"fraction is {self.fraction}, expected more than 0 and at most 1")
        for name, least in (("new_tokens", 1), ("exclude_last_n", 0), ("count", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise LocateError(f"{name} is {value}, expected at least {least}")

    @property
    def answers(self) -> bool:
        """Whether answers are needed."""
        return self.positions in ("predicting", "completion")


def locate(
    recipient: Twin,
    donor: Twin,
    prompts: Sequence[Tokens],
    options: ContrastOptions | None = None,
    *,
    batch_tokens: int = 4096,
    cache: Cache | None = None,
    identity: Any = None,
    progress: bool = False,
) -> Scores:
    """Change scores ``mlp`` ``[layers, mlp_width]``, and the highest of them selected. Raises LocateError.

    ``extra`` holds ``mean.recipient``, ``std.recipient``, ``mean.donor`` and ``std.donor`` of the same shape,
    over the same tokens; NaN where there is no site. ``cost`` also counts tokens ``compared``, and the
    ``prompts`` used and left out because they were ``too_long`` or got an ``empty`` answer.

    ``batch_tokens`` bounds the padded tokens of one forward pass; the recipient's activations of one pass are
    held until the donor's are there: layers × width × compared tokens.

    With a cache, answers and sums are kept for every 32 prompts under ``identity``, a JSON-able document that
    names both models, their dtype and device; an interrupted run resumes there.
    """
    options = options or ContrastOptions()
    check_twins(recipient, donor)
    layers = _candidates(recipient.model, options)
    usable = _usable(recipient.model, prompts, options)
    kept = Kept(cache if cache is not None and identity is not None else Cache(None), identity)
    comparison = Comparison(recipient, donor, options, batch_tokens, kept)
    total: Float64Array | None = None
    texts: list[Text] = []
    for start in tqdm(range(0, len(usable), CHUNK), "change scores", disable=not progress):
        part = comparison.texts(usable[start : start + CHUNK])
        if part:
            found = comparison.sums(part)
            total = found if total is None else total + found
            texts += part
    if total is None:
        raise LocateError("no prompt is usable: every answer is empty; let the other twin write the answers")
    tokens = sum(len(compared(len(p), len(a), options.positions)) for p, a in texts)
    scores, extra = finish(total, tokens)
    broken = [layer for layer in comparison.layers if not np.isfinite(total[:, layer]).all()]
    if broken:
        raise LocateError(f"activations are not finite at layers {broken}; load the models in a wider dtype")
    scores[layers.stop :] = np.nan
    by_component: dict[Component, Float64Array] = {"mlp": scores}
    cost = {
        **comparison.cost.as_dict(),
        "compared": float(tokens),
        "prompts": float(len(texts)),
        "too_long": float(len(prompts) - len(usable)),
        "empty": float(len(usable) - len(texts)),
    }
    return Scores(by_component, _select(by_component, options), cost, extra, tuple(texts))


class Kept(NamedTuple):
    """Where parts of a run are kept, and what they depend on besides prompts and options."""

    cache: Cache
    identity: Any


class Comparison:
    """Two twins and how they are compared, a few prompts at a time."""

    def __init__(
        self, recipient: Twin, donor: Twin, options: ContrastOptions, batch_tokens: int, kept: Kept
    ) -> None:
        self._recipient, self._donor, self._options = recipient, donor, options
        self._batch_tokens, self._kept = batch_tokens, kept
        self.cost = Cost()
        self._shape = shape_of(recipient.model.config)
        self.layers = range(self._shape.first_mlp_layer, self._shape.layers)

    def texts(self, prompts: list[Tokens]) -> list[Text]:
        """The prompts with their answers; without those whose answer is needed, and empty."""
        if not self._options.answers:
            return [(prompt, ()) for prompt in prompts]
        answers = zip(prompts, self._answers(prompts), strict=True)
        return [(prompt, answer) for prompt, answer in answers if answer]

    def _answers(self, prompts: list[Tokens]) -> list[Tokens]:
        source, new_tokens = self._options.generate_with, self._options.new_tokens
        key = [self._kept.identity, "answers", source, new_tokens, prompts]
        found = self._kept.cache.texts("contrast", key)
        if found is not None and len(found) == len(prompts):
            return [tuple(int(token) for token in row.split()) for row in found]
        twin = self._recipient if source == "recipient" else self._donor
        answers = greedy(twin, prompts, new_tokens=new_tokens, batch_tokens=self._batch_tokens)
        self.cost.add([(*prompt, *answer) for prompt, answer in zip(prompts, answers, strict=True)])
        self._kept.cache.keep_texts("contrast", key, [" ".join(map(str, answer)) for answer in answers])
        return answers

    def sums(self, texts: list[Text]) -> Float64Array:
        """Sums over the compared tokens of some texts, float64 ``[STATISTICS, layers, width]``."""
        key = [self._kept.identity, "sums", self._options.positions, texts]
        # The cache keeps any dtype; its signature names the one that activations have.
        found: Any = self._kept.cache.array("contrast", key)
        if found is not None and found.shape == (STATISTICS, self._shape.layers, self._shape.mlp_width):
            return np.asarray(found, dtype=np.float64)
        sums = Sums()
        places: list[Place] = [(layer, "mlp") for layer in self.layers]
        lengths = [len(prompt) + len(answer) for prompt, answer in texts]
        for group in batches(lengths, tokens=self._batch_tokens):
            batch = [texts[i] for i in group]
            add_texts(sums, self._recipient, self._donor, places, batch, self._options.positions)
            self.cost.add(2 * [(*prompt, *answer) for prompt, answer in batch])
        array: Any = sums.array(self._shape.layers)
        self._kept.cache.keep_array("contrast", key, array)
        return np.asarray(array, dtype=np.float64)


def _candidates(model: Any, options: ContrastOptions) -> range:
    shape = shape_of(model.config)
    layers = range(shape.first_mlp_layer, shape.layers - options.exclude_last_n)
    # Asked for in any case: a model without MLP sites has an error of its own.
    if not shape.units("mlp") or not layers:
        raise LocateError(
            f"{shape.layers} layers leave no candidates when the last {options.exclude_last_n} are excluded; "
            "expected at least one layer with an MLP site below them"
        )
    return layers


def _usable(model: Any, prompts: Sequence[Tokens], options: ContrastOptions) -> list[Tokens]:
    check_prompts(prompts)
    context = int(model.config.max_position_embeddings)
    limit = context - (options.new_tokens if options.answers else 0)
    usable = [prompt for prompt in prompts if len(prompt) <= limit]
    if not usable:
        raise LocateError(
            f"the context of {context} tokens is too short for any of {len(prompts)} prompts, the shortest "
            f"of {min(map(len, prompts))} tokens, with {context - limit} new tokens; ask for fewer new tokens"
        )
    return usable


def _select(scores: Mapping[Component, Float64Array], options: ContrastOptions) -> dict[Component, BoolArray]:
    try:
        if options.count is not None:
            return top(scores, count=options.count)
        return top(scores, fraction=options.fraction)
    except UnitSetError as error:
        raise LocateError(str(error)) from error


def run(
    checkpoint: Checkpoint,
    donor: Checkpoint,
    dataset: Dataset,
    options: ContrastOptions,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    batch_tokens: int = 4096,
    seed: int = 0,
    progress: bool = False,
    cache: Cache | None = None,
    statistics: Path | None = None,
) -> UnitSet:
    """Compare two checkpoints on all prompts of a data set, whatever their label.

    ``checkpoint`` is the recipient, ``donor`` its aligned twin; an (IA)³ vector that one of them holds folded
    into its weights is taken into account. ``seed`` is recorded only: nothing is drawn. ``statistics`` names
    a safetensors file for mean and standard deviation of both models. Raises LocateError, CheckpointError.
    """
    if checkpoint.shape != donor.shape:
        raise LocateError(f"the twins differ in shape: {checkpoint.shape} and {donor.shape}")
    tokenizer = checkpoint.load_tokenizer()
    if tokenizer.get_vocab() != donor.load_tokenizer().get_vocab():
        raise LocateError(
            f"{checkpoint.name} and {donor.name} have different vocabularies; "
            "twins must read the same token ids"
        )
    identity = {
        "models": [[c.weights_sha256, c.adapter and c.adapter.sha256] for c in (checkpoint, donor)],
        "dtype": dtype,
        "device": device,
        "versions": versions(),
    }
    found = locate(
        *folded_twins(checkpoint.load_model(dtype, device), donor.load_model(dtype, device)),
        [templates.render(tokenizer, prompt, options.template) for prompt in dataset.prompts],
        options,
        batch_tokens=batch_tokens,
        cache=cache,
        identity=identity,
        progress=progress,
    )
    return unit_set(
        "contrast",
        found,
        options,
        checkpoint,
        [dataset],
        tokenizer,
        seed=seed,
        donor=donor,
        statistics=statistics,
    )
