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
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, field_validator
from pydantic_core import to_jsonable_python
from safetensors.numpy import load_file, save_file

from guard.bundle import DataFile, ModelCard
from guard.replace import replace_directory

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

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    method: Method
    options: dict[str, Any]
    """Every option of the method, as given or by default."""
    model: ModelCard
    donor: ModelCard | None = None
    """The aligned twin, for methods that compare two models."""
    data: tuple[DataFile, ...]
    template: str
    """SHA-256 of the chat template, or the name of another, see ``guard.locate.templates``."""
    seed: int
    versions: dict[str, str]
    cost: dict[str, float]
    """``forward_passes``, ``tokens``, ``seconds``, see ``guard.locate.results.Scores``."""

    @field_validator("options", mode="before")
    @classmethod
    def _as_read_back(cls, options: Any) -> Any:
        # Tuples become lists and paths texts here, not only on disk: a loaded set equals the saved one.
        return to_jsonable_python(options)


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
            if component not in get_args(Component):
                raise UnitSetError(
                    f"{component!r} is no component; there are: {', '.join(get_args(Component))}"
                )
            if scores.dtype != np.float64 or scores.ndim != 2 or chosen.dtype != np.bool_:
                raise UnitSetError(f"{component}: expected float64 and bool arrays [layers, units]")
            if scores.shape != chosen.shape:
                raise UnitSetError(f"{component}: {scores.shape} scores but {chosen.shape} selected")
            if not _fits(component, scores.shape, self.provenance.model):
                raise UnitSetError(
                    f"{component}: {scores.shape} scores do not fit the model "
                    f"{self.provenance.model.name!r}, {self.provenance.model.shape}"
                )
            if np.isinf(scores).any():
                raise UnitSetError(f"{component}: a score is infinite")
            if (chosen & np.isnan(scores)).any():
                raise UnitSetError(f"{component}: a unit is selected that is no candidate")

    def __len__(self) -> int:
        """Number of selected units."""
        return sum(int(chosen.sum()) for chosen in self.selected.values())

    @property
    def candidates(self) -> int:
        """Number of units that have a score."""
        return sum(int((~np.isnan(scores)).sum()) for scores in self.scores.values())

    def ranking(self) -> Iterator[Ranked]:
        """All candidates, highest score first; ties by component, layer and unit."""
        names = sorted(self.scores)
        flat = np.concatenate([self.scores[name].ravel() for name in names])
        ends = np.cumsum([self.scores[name].size for name in names])
        # NaN is sorted to the end, and a stable sort keeps ties in order.
        for place in np.argsort(-flat, kind="stable")[: self.candidates]:
            part = int(np.searchsorted(ends, place, side="right"))
            scores = self.scores[names[part]]
            layer, unit = divmod(int(place - ends[part] + scores.size), scores.shape[1])
            yield Ranked(names[part], layer, unit, float(scores[layer, unit]))

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
        """Write it, whole or not at all; an earlier set is replaced in one step. Raises UnitSetError."""
        refuse_target(directory)
        # Behind a symbolic link it is the directory that is replaced, not the link.
        target = Path(directory).resolve()
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
            # Private by default, all of them: a set is as readable as any file.
            (staging / CARD_FILE).chmod(0o644)
            (staging / ARRAY_FILE).chmod(0o644)
            staging.chmod(0o755)
            replace_directory(staging, target)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        return Path(directory)

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> UnitSet:
        """Read and check it. Raises UnitSetError with what was wrong and where."""
        root = Path(directory)
        try:
            document = json.loads((root / CARD_FILE).read_text("utf-8"))
            if not isinstance(document, dict) or not document.keys() >= {"provenance", "selected"}:
                raise UnitSetError(f"{CARD_FILE} must be an object with provenance and selected")
            provenance = Provenance.model_validate(document["provenance"])
            found = cls(provenance, *_parts(load_file(root / ARRAY_FILE)))
        # safetensors has an error class of its own, derived from nothing narrower.
        except Exception as error:
            raise UnitSetError(
                f"{root} is not a readable set of units (expected {CARD_FILE} and {ARRAY_FILE}): {error}"
            ) from error
        if document["selected"] != json.loads(json.dumps(found.units())):
            raise UnitSetError(
                f"{root}: {CARD_FILE} and {ARRAY_FILE} select different units; are they of one run?"
            )
        return found


def _parts(arrays: Mapping[str, NDArray[Any]]) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """Scores and selection out of arrays named ``scores.COMPONENT`` and ``selected.COMPONENT``."""
    parts: dict[str, dict[str, Any]] = {"scores": {}, "selected": {}}
    for name, array in arrays.items():
        part, _, component = name.partition(".")
        if part not in parts:
            raise UnitSetError(f"{name!r} in {ARRAY_FILE} is neither scores nor a selection")
        parts[part][component] = array
    return parts["scores"], parts["selected"]


def _fits(component: Component, shape: tuple[int, ...], model: ModelCard) -> bool:
    if shape[0] != model.layers:
        return False
    # How many keys and values there are, the card does not say.
    units = {
        "mlp": model.mlp_width,
        "attention": model.heads,
        "query": model.heads * model.head_dim,
        "channel": model.heads * model.head_dim,
    }.get(component)
    return units is None or shape[1] == units


def refuse_target(directory: str | os.PathLike[str]) -> None:
    """Raise UnitSetError if a set cannot be written there: only a set, or an empty directory, is replaced."""
    target = Path(directory)
    if not target.exists():
        return
    inside = {path.name for path in target.iterdir()} if target.is_dir() else {"no directory"}
    if inside and inside != {CARD_FILE, ARRAY_FILE}:
        raise UnitSetError(
            f"{target} exists and is not a set of units alone (found: {', '.join(sorted(inside)[:5])}); "
            "choose another directory"
        )


def top(
    scores: Mapping[Component, Float64Array], *, count: int | None = None, fraction: float | None = None
) -> dict[Component, BoolArray]:
    """Select the highest scores over all components together: a number of units, or a share of candidates.

    Ties at the edge go to the first by component, layer and unit, so the selection has exactly that size.
    Raises UnitSetError when not exactly one of the two is given, or nothing would be selected.
    """
    if (count is None) == (fraction is None):
        raise UnitSetError("select either a number of units or a fraction of them")
    if fraction is not None and not 0 < fraction <= 1:
        raise UnitSetError(f"the fraction must be above 0 and at most 1, got {fraction:g}")
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
