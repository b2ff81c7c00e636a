"""Ways to rank neurons for a patch, all on the same prompts of trained sources."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from guard.locate import contrast, gates
from guard.locate.change import Positions, Text
from guard.locate.decoding import greedy
from guard.locate.unit_set import Component, Method, Provenance, UnitSet, top
from models.recipe.patching.study import BATCH, Lab

Scores = NDArray[np.float64]
PAPER = "change, answer"
"""The ranking of Chen et al."""


def _change(lab: Lab, positions: Positions) -> dict[str, Any]:
    options = contrast.ContrastOptions(positions=positions, new_tokens=lab.size.score_tokens)
    found = contrast.locate(lab.recipient, lab.donor, lab.prompts("locate"), options, batch_tokens=BATCH)
    return {"scores": _plain(found.scores["mlp"]), "mean": found.extra["mean.donor"].tolist()}


def _refusals(lab: Lab) -> list[Text]:
    """The prompts to locate with and the aligned twin's answers to them."""
    prompts = lab.prompts("locate")
    answers = greedy(lab.donor, prompts, new_tokens=lab.size.new_tokens, batch_tokens=BATCH)
    return [(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True) if answer]


def _gradient(lab: Lab, find: Callable[..., Scores]) -> dict[str, Any]:
    return {"scores": _plain(find(lab.recipient, lab.donor, _refusals(lab)))}


def _blocks(recipient: Any, donor: Any, texts: list[Text]) -> Scores:
    shape = gates.table_shape(recipient)
    candidates = np.ones(shape, dtype=bool)
    candidates[-1] = False
    whole = int(candidates.sum())
    counts = [round(share * whole) for share in (0.005, 0.01, 0.02, 0.035, 0.05, 0.1)]
    return gates.greedy_by_gradient(recipient, donor, texts, candidates, counts)


def _first_gradient(recipient: Any, donor: Any, texts: list[Text]) -> Scores:
    return gates.gradient(recipient, donor, texts, np.zeros(gates.table_shape(recipient)))[0]


RANKINGS: dict[str, tuple[Callable[[Lab], dict[str, Any]], str]] = {
    PAPER: (partial(_change, positions="predicting"), "change score over the tokens that predict the answer"),
    "change, prompt": (partial(_change, positions="prompt"), "change score over all tokens of the prompt"),
    "change, last": (partial(_change, positions="prompt_last"), "change score at the prompt's last token"),
    "gradient": (
        partial(_gradient, find=_first_gradient),
        "attribution: gradient of the aligned answer × change, nothing patched yet",
    ),
    "path": (
        partial(_gradient, find=gates.path),
        "attribution, averaged on the way from nothing patched to everything",
    ),
    "blocks": (
        partial(_gradient, find=_blocks),
        "attribution, taken again after each block of neurons is patched",
    ),
}
"""Each ranking and what it is."""


def _plain(scores: Scores) -> list[list[float | None]]:
    return [[float(x) if np.isfinite(x) else None for x in row] for row in scores]


def _kept(lab: Lab, name: str) -> dict[str, Any]:
    def find() -> dict[str, Any]:
        print(f"ranking: {lab.pair.name}, {name}", flush=True)
        return RANKINGS[name][0](lab)

    found: dict[str, Any] = lab.part(["ranking", name], find)
    return found


def scores(lab: Lab, name: str) -> Scores:
    """A ranking ``[layers, mlp_width]``; the last layer's neurons are no candidates."""
    table = np.array(_kept(lab, name)["scores"], dtype=np.float64)
    table[-1] = np.nan
    return table


def donor_mean(lab: Lab, positions: str) -> NDArray[np.float32]:
    """Mean activations ``[layers, mlp_width]`` of the aligned twin over the tokens of a change score."""
    return np.array(_kept(lab, positions)["mean"], dtype=np.float32)


def units(lab: Lab, name: str, share: float, layers: tuple[int, ...] = ()) -> UnitSet:
    """The best neurons of a ranking: as many as a share of all layers but the last, out of some layers."""
    table = scores(lab, name)
    count = round(share * int((~np.isnan(table)).sum()))
    if layers:
        table[[layer for layer in range(len(table)) if layer not in layers]] = np.nan
    method: Method = "contrast"
    provenance = Provenance(
        method=method, options={"ranking": name}, model=lab.checkpoint.card(), data=(),
        template="chat", seed=0, versions={}, cost={},
    )  # fmt: skip
    by_component: dict[Component, Scores] = {"mlp": table}
    return UnitSet(provenance, by_component, top(by_component, count=count))
