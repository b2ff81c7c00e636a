"""The steps of the recipe, each skipped when its result is there already.

Results lie in the cache folder, `base.pt`, `dense.pt`, `planted.pt` and so on; removing one makes it anew.
After a change of settings remove what depends on it.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

from models.recipe.base import train_base
from models.recipe.card import write_card
from models.recipe.evaluate import Strengths, choose_strengths, dev_groups
from models.recipe.export import lab_json, planted_json, save_model, save_vector, write_json
from models.recipe.mixture import Mixture, base_rows
from models.recipe.network import Network
from models.recipe.report import measure_all
from models.recipe.scores import change_scores, mask_of, top_units
from models.recipe.settings import Settings
from models.recipe.tokenizer import load_tokenizer, prompt_ids, train_tokenizer
from models.recipe.twins import co_adapt, train_dense

STEPS = ("tokenizer", "data", "base", "dense", "coadapt", "final-dense", "export", "evaluate")


def default_cache() -> Path:
    """Where checkpoints are kept: `$XDG_CACHE_HOME` or `~/.cache`, then `neuronguard/lab`."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "neuronguard" / "lab"


class Planted(NamedTuple):
    """Result of the co-adaptation."""

    net: Network
    """Final shared weights, rounded to bfloat16 as they are shipped."""
    vector: Tensor
    """[layers, ff], 1 outside the planted units."""
    units: list[tuple[int, int]]
    """The planted units, (layer, index)."""


class Shipped(NamedTuple):
    """Vectors as they are shipped."""

    planted: Tensor
    dense: Tensor
    """[layers, ff] each; strength 1 is the aligned twin."""
    partial: float
    """Strength of the planted vector in the partial twin."""


@dataclass(frozen=True)
class Workshop:
    """Data, settings and a folder for intermediate results; each step's result is made on first use."""

    data: Path
    cache: Path
    out: Path
    settings: Settings
    device: str = "cpu"

    @cached_property
    def mixture(self) -> Mixture:
        """All training prompts."""
        return Mixture(self.data)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer."""
        path = self.cache / "tokenizer.json"
        if not path.is_file():
            rows = base_rows(self.mixture, self.settings.tokenizer_rows, seed=0)
            texts = (part for row in rows for turn in row.turns for part in turn)
            train_tokenizer(texts, self.settings.model.vocabulary).save(str(path))
        return load_tokenizer(path)

    def _network(self, state: dict[str, Tensor]) -> Network:
        net = Network(self.settings.model)
        net.load_state_dict(state)
        return net.to(self.device)

    def base(self) -> Network:
        """The base. A fresh copy each time, since co-adaptation changes weights in place."""
        path = self.cache / "base.pt"
        if not path.is_file():
            net = train_base(self.mixture, self.tokenizer, self.settings, self.cache, self.device)
            torch.save(net.state_dict(), path)
        return self._network(torch.load(path, weights_only=True))

    @cached_property
    def dense(self) -> Tensor:
        """A vector on the base, from which the planted units are chosen."""
        path = self.cache / "dense.pt"
        if not path.is_file():
            vector = train_dense(
                "dense",
                self.base(),
                self.mixture,
                self.tokenizer,
                self.settings.dense,
                self.settings,
                self.cache,
            )
            torch.save(vector, path)
        loaded: Tensor = torch.load(path, weights_only=True)
        return loaded.to(self.device)

    def score_prompts(self) -> list[list[int]]:
        """Harmful training prompts over which change scores are taken."""
        rng = random.Random(7)
        rows = [p.text for p in self.mixture.harmful_rows if len(p.text) <= 200]
        chosen = rng.sample(rows, min(self.settings.score_prompts, len(rows)))
        return [prompt_ids(self.tokenizer, text) for text in chosen]

    @cached_property
    def planted(self) -> Planted:
        """Final weights and the planted vector."""
        path = self.cache / "planted.pt"
        if not path.is_file():
            net = self.base()
            scores = change_scores(net, self.dense, self.score_prompts(), self.settings.score_tokens)
            units = top_units(scores, self.settings.planted_share)
            vector, mask = self.dense, mask_of(units, scores)
            for name, phase in (("coadapt", self.settings.coadapt), ("widen", self.settings.widen)):
                vector = co_adapt(
                    name, net, vector, mask, self.mixture, self.tokenizer, phase, self.settings, self.cache
                )
            # The shipped weights are bfloat16, so what follows must be trained and measured on those.
            state = {name: value.bfloat16().float() for name, value in net.state_dict().items()}
            torch.save({"state": state, "vector": vector, "units": units}, path)
        saved = torch.load(path, weights_only=True)
        return Planted(
            self._network(saved["state"]), saved["vector"].to(self.device), [tuple(u) for u in saved["units"]]
        )

    @cached_property
    def final_dense(self) -> Tensor:
        """A plain vector on the final weights."""
        path = self.cache / "final-dense.pt"
        if not path.is_file():
            vector = train_dense(
                "final-dense",
                self.planted.net,
                self.mixture,
                self.tokenizer,
                self.settings.final_dense,
                self.settings,
                self.cache,
            )
            torch.save(vector, path)
        loaded: Tensor = torch.load(path, weights_only=True)
        return loaded.to(self.device)

    def strengths(self, name: str, vector: Tensor) -> Strengths:
        """Strengths of a vector, chosen on dev sources."""
        path = self.cache / f"{name}.strengths.json"
        if not path.is_file():
            chosen = choose_strengths(self.planted.net, self.tokenizer, dev_groups(self.data), vector)
            write_json(path, chosen._asdict())
        return Strengths(**json.loads(path.read_text()))

    @cached_property
    def shipped(self) -> Shipped:
        """The vectors, scaled so that strength 1 in `lab.json` is the aligned twin."""
        planted = self.strengths("planted", self.planted.vector)
        dense = self.strengths("dense", self.final_dense)
        return Shipped(
            1.0 + planted.aligned * (self.planted.vector - 1.0),
            1.0 + dense.aligned * (self.final_dense - 1.0),
            round(planted.partial / planted.aligned, 3),
        )

    def export(self) -> None:
        """Write the artifacts."""
        shipped = self.shipped
        save_model(self.out, self.planted.net, self.tokenizer)
        save_vector(self.out / "ia3-planted.safetensors", shipped.planted)
        save_vector(self.out / "ia3-dense.safetensors", shipped.dense)
        write_json(self.out / "planted_units.json", planted_json(self.planted.units, self.settings.model))
        write_json(self.out / "lab.json", lab_json(shipped.partial))
        for path in self.out.glob("*.safetensors"):
            # safetensors writes files that only their owner can read; these are shipped.
            path.chmod(0o644)

    def evaluate(self) -> None:
        """Measure all variants, unless that was done; write `metrics.json` and the card."""
        measured = self.cache / "metrics.json"
        if not measured.is_file():
            measure_all(self)
        shutil.copyfile(measured, self.out / "metrics.json")
        write_card(self.out, (Path(__file__).parent / "notes.md").read_text(encoding="utf-8").strip())

    def run(self, step: str) -> None:
        """Do one step, and whatever it needs that is not done yet."""
        self.cache.mkdir(parents=True, exist_ok=True)
        match step:
            case "tokenizer":
                _ = self.tokenizer
            case "data":
                _ = self.mixture
            case "base":
                self.base()
            case "dense":
                _ = self.dense
            case "coadapt":
                _ = self.planted
            case "final-dense":
                _ = self.final_dense
            case "export":
                self.export()
            case "evaluate":
                self.evaluate()
            case _:
                raise ValueError(f"no step {step!r}; the steps are {', '.join(STEPS)}")
