"""The UnitSet: what every method of ``guard.locate`` returns: scores of all candidates, and a selection.

On disk it is a directory with ``units.json`` (who, from what, which were selected; readable by people) and
``units.safetensors`` (scores and selection as arrays). A ranking is meaningless for other weights, so the
model's digests are part of it.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.numpy import load_file, save_file

from guard.bundle import DataFile, ModelCard

CARD_FILE = "units.json"
ARRAY_FILE = "units.safetensors"

Component = Literal["mlp", "attention", "query", "key", "value", "channel"]
"""``mlp``: neurons, ``[layers, intermediate]``; ``attention``: heads, ``[layers, heads]``; ``channel``:
columns of the input of ``o_proj``, ``[layers, heads * head_dim]``; the others: rows of the projections,
``[layers, out_features]``."""
Method = Literal["contrast", "importance", "heads", "capacity", "random", "window"]

Float64Array = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


class UnitSetError(ValueError):
    """A set of units cannot be read, or its parts do not fit together."""


class Provenance(BaseModel):
    """Where a UnitSet comes from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Method
    options: dict[str, Any]
    """Every option of the method, as given or by default."""
    model: ModelCard
    donor: ModelCard | None = None
    """The aligned twin, for methods that compare two models."""
    data: tuple[DataFile, ...]
    template: str
    """SHA-256 of the chat template, or the name of a paper's own template."""
    seed: int
    versions: dict[str, str]
    cost: dict[str, float]
    """``forward_passes``, ``tokens``, ``seconds``."""


class Ranked(NamedTuple):
    """One unit in a ranking."""

    component: Component
    layer: int
    unit: int
    score: float


@dataclass(frozen=True, eq=False)
class UnitSet:
    """Scores and selection of one run of one method. Raises UnitSetError when they do not fit together."""

    provenance: Provenance
    scores: Mapping[Component, Float64Array]
    """float64 ``[layers, units]``; higher is more of what the method looks for; NaN: no candidate."""
    selected: Mapping[Component, BoolArray]
    """Which units the method selects, ``[layers, units]``."""

    def __post_init__(self) -> None:
        if not self.scores or self.scores.keys() != self.selected.keys():
            raise UnitSetError("scores and selection must name the same components, at least one")
        for component, scores in self.scores.items():
            chosen = self.selected[component]
            if scores.dtype != np.float64 or scores.ndim != 2 or chosen.dtype != np.bool_:
                raise UnitSetError(f"{component}: expected float64 and bool arrays [layers, units]")
            if scores.shape != chosen.shape:
                raise UnitSetError(f"{component}: {scores.shape} scores but {chosen.shape} selected")
            if np.isinf(scores).any():
                raise UnitSetError(f"{component}: a score is infinite")
            if (chosen & np.isnan(scores)).any():
                raise UnitSetError(f"{component}: a unit is selected that is no candidate")

    def __len__(self) -> int:
        """Number of selected units."""
        return sum(int(chosen.sum()) for chosen in self.selected.values())

    def ranking(self) -> Iterator[Ranked]:
        """All candidates, highest score first; ties by component, layer and unit."""
        rows = [
            Ranked(component, int(layer), int(unit), float(scores[layer, unit]))
            for component, scores in sorted(self.scores.items())
            for layer, unit in np.argwhere(~np.isnan(scores))
        ]
        yield from sorted(rows, key=lambda row: -row.score)

    def units(self) -> dict[Component, dict[int, list[int]]]:
        """The selected units, by component and layer."""
        return {
            component: {
                int(layer): np.flatnonzero(chosen[layer]).tolist()
                for layer in np.flatnonzero(chosen.any(axis=1))
            }
            for component, chosen in self.selected.items()
        }

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write it; the directory appears whole or not at all, in place of an earlier one. Raises UnitSetError."""
        target = Path(directory)
        if target.exists() and not (target / CARD_FILE).exists() and any(target.iterdir()):
            raise UnitSetError(f"{target} exists and holds no set of units; choose another directory")
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            document = {"provenance": self.provenance.model_dump(mode="json"), "selected": self.units()}
            (staging / CARD_FILE).write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", "utf-8")
            arrays = {f"scores.{name}": np.ascontiguousarray(array) for name, array in self.scores.items()}
            arrays |= {
                f"selected.{name}": np.ascontiguousarray(array) for name, array in self.selected.items()
            }
            save_file(arrays, staging / ARRAY_FILE)
            (staging / ARRAY_FILE).chmod(0o644)
            staging.chmod(0o755)
            if target.exists():
                shutil.rmtree(target)
            staging.rename(target)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        return target

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> UnitSet:
        """Read and check it. Raises UnitSetError with what was wrong and where."""
        root = Path(directory)
        try:
            document = json.loads((root / CARD_FILE).read_text("utf-8"))
            arrays = load_file(root / ARRAY_FILE)
            provenance = Provenance.model_validate(document["provenance"])
        except (OSError, ValueError, KeyError, ValidationError) as error:
            raise UnitSetError(f"{root} is not a readable set of units: {error}") from error
        parts: dict[str, dict[Any, Any]] = {"scores": {}, "selected": {}}
        for name, array in arrays.items():
            part, _, component = name.partition(".")
            parts.setdefault(part, {})[component] = array
        return cls(provenance, parts["scores"], parts["selected"])


def top(
    scores: Mapping[Component, Float64Array], *, count: int | None = None, fraction: float | None = None
) -> dict[Component, BoolArray]:
    """Select the highest scores over all components together: a number of units, or a share of the candidates.

    Ties at the edge go to the first by component, layer and unit, so the selection has exactly that size.
    Raises UnitSetError when not exactly one of the two is given, or nothing would be selected.
    """
    if (count is None) == (fraction is None):
        raise UnitSetError("select either a number of units or a fraction of them")
    names = sorted(scores)
    flat = np.concatenate([scores[name].ravel() for name in names])
    candidates = int((~np.isnan(flat)).sum())
    wanted = count if count is not None else round(candidates * float(fraction or 0.0))
    if not 1 <= wanted <= candidates:
        raise UnitSetError(f"{wanted} units of {candidates} candidates cannot be selected")
    order = np.argsort(-np.where(np.isnan(flat), -np.inf, flat), kind="stable")[:wanted]
    mask = np.zeros(len(flat), dtype=np.bool_)
    mask[order] = True
    selected, begin = {}, 0
    for name in names:
        size = scores[name].size
        selected[name] = mask[begin : begin + size].reshape(scores[name].shape)
        begin += size
    return selected
