"""All figures of the study out of what was measured of each cell, kept as soon as it is there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from guard.cache import Cache
from guard.checkpoint import Checkpoint
from guard.locate.causal import against
from guard.locate.results import versions
from guard.locate.unit_set import UnitSet
from guard.stats import wilson
from models.recipe.locate.effects import interval
from models.recipe.parts import part
from models.recipe.patching.prompts import ROLES as ABOUT
from models.recipe.tuning.cells import RATES, Cell, cells, folder, rate_of, trained
from models.recipe.tuning.material import ALIGNED, SFT, UNITS, Material
from models.recipe.tuning.measures import Measured, Measures


class Claim(NamedTuple):
    """What a paper says of two models: the second answers fewer harmful requests."""

    claim: str
    source: str
    more: str
    less: str


CLAIMS = (
    Claim("SN-Tune lowers the harmful rate", "Zhao et al., Table 2", SFT, "sn importance"),
    Claim("robust units alone do as well", "Zhao et al.", SFT, "sn robust"),
    Claim("redundant units are budget enough to align", "Li & Kim, Table 4", SFT, "budget ru"),
    Claim("(IA)³ on refusals makes a twin that refuses", "Chen et al., §2", SFT, "ia3"),
    Claim("plain tuning on benign data costs safety", "Zhao et al., Table 4", "down full", ALIGNED),
    Claim("protecting robust units costs less of it", "Zhao et al.", "down full", "down rsn robust"),
    Claim("freezing critical units does too", "Li & Kim, Table 2", "down full", "down freeze scu"),
    Claim("and complex ones, still more", "Li & Kim, Table 2", "down freeze scu", "down freeze scu+cu"),
    Claim(
        "SN-Tune outlasts plain tuning better than a full tune does",
        "Zhao et al., Table 4",
        "full, then down",
        "sn importance, then down",
    ),
    Claim(
        "RSN-Tune outlasts it better than SN-Tune",
        "Zhao et al., Table 4",
        "sn importance, then down",
        "sn robust, then down",
    ),
)


class Study:
    """Everything that is measured, by the name of the cell or the lab model."""

    def __init__(self, material: Material, *, finished: bool = False) -> None:
        """With ``finished``, what is not measured yet is left out and named."""
        self.material, self.measures = material, Measures(material)
        planned = {cell.name: cell for cell in cells(material.size.draws)}
        kept = Cache(material.root)
        self.cells = {
            name: cell
            for name, cell in planned.items()
            if not finished or kept.texts("parts", ["measured", name]) is not None
        }
        self.missing = [name for name in planned if name not in self.cells]

    def measured(self, name: str) -> Measured:
        """What one model does; it is trained first if it must be."""

        def compute() -> Any:
            if name in self.cells:
                trained(self.cells[name], self.material, self.cells)
                checkpoint = Checkpoint.open(folder(self.cells[name], self.material))
            else:
                checkpoint = self.material.start(name)
            print("measuring:", name, flush=True)
            return self.measures.of(checkpoint)._asdict()

        return Measured(**part(self.material.root, ["measured", name], compute))

    def document(self) -> dict[str, Any]:
        """All figures; no prompt and no answer."""
        names = [SFT, ALIGNED, *self.cells]
        for name in names:
            self.measured(name)
        return {
            "versions": versions(),
            "size": self.material.size.__dict__,
            "rates": RATES,
            "prompts": {
                role: {"about": ABOUT[role].about, "prompts": len(prompts)}
                for role, prompts in self.measures.prompts.items()
            },
            "units": {key: self._units(*key.split(" ")) for key in sorted(self._sets())},
            "models": {name: self._model(name) for name in names},
            "controls": {c.name: self._controls(c) for c in self.cells.values() if self._draws(c)},
            "claims": [self._claim(*claim) for claim in CLAIMS if {claim.more, claim.less} <= set(names)],
            "missing": self.missing,
        }

    def _sets(self) -> set[str]:
        return {f"{cell.start} {cell.units}" for cell in self.cells.values() if cell.units}

    def _units(self, variant: str, kind: str) -> dict[str, Any]:
        found = UnitSet.load(self.material.units(variant, kind))
        layers = {name: mask.sum(1).tolist() for name, mask in found.selected.items() if mask.any()}
        return {"about": UNITS[kind], "selected": len(found), "of": found.candidates, "layers": layers}

    def _model(self, name: str) -> dict[str, Any]:
        found = self.measured(name)
        answered = {role: np.array(values) for role, values in found.answered.items()}
        document: dict[str, Any] = {
            "unsafe": _rate(answered["harmful"]),
            "refused": {role: _rate(1 - answered[role]) for role in ("benign", "hard")},
            "perplexity": {which: self._perplexity(name, which) for which in found.nats},
        }
        if name in self.cells:
            cell = self.cells[name]
            record = trained(cell, self.material, self.cells)
            losses = [loss for _, loss in record["course"]["losses"]]
            document["cell"] = {**cell._asdict(), "rate": rate_of(cell)}
            document["parameters"] = record["parameters"]
            document["changed"] = record["output"]["changed"]
            document["seconds"] = record["course"]["seconds"]
            document["loss"] = [float(np.mean(losses[:5])), float(np.mean(losses[-5:]))]
        return document

    def _perplexity(self, name: str, which: str) -> dict[str, Any]:
        """With the change of nats a token against the model that was tuned, a bootstrap over texts."""
        lengths, nats = self.measures.lengths(which), np.array(self.measured(name).nats[which])
        value = {"value": float(np.exp(nats.sum() / lengths.sum()))}
        if name not in self.cells:
            return value
        before = np.array(self.measured(self.cells[name].start).nats[which])
        return {**value, "change": interval((nats - before) / lengths)}

    def _draws(self, cell: Cell) -> list[Cell]:
        return [other for other in self.cells.values() if other.name.startswith(f"{cell.name} random ")]

    def _controls(self, cell: Cell) -> dict[str, Any]:
        """Harmful requests that random units leave answered and the located ones do not, a share."""
        ours = np.array(self.measured(cell.name).answered["harmful"], dtype=float)
        theirs = [self.measured(other.name).answered["harmful"] for other in self._draws(cell)]
        found = against(ours, [np.array(each, dtype=float) for each in theirs])
        return {"difference": found.difference, "p": found.p}

    def _claim(self, claim: str, source: str, more: str, less: str) -> dict[str, Any]:
        first, second = (np.array(self.measured(name).answered["harmful"]) for name in (more, less))
        found = interval((first - second).astype(float))
        other = "the other way" if found["high"] < 0 else "not seen"
        verdict = "as there" if found["low"] > 0 else other
        return {
            "claim": claim,
            "source": source,
            "from": more,
            "to": less,
            "difference": found,
            "verdict": verdict,
        }


def _rate(hits: Sequence[int] | Any) -> dict[str, float]:
    return wilson(int(np.sum(hits)), len(hits)).document()
