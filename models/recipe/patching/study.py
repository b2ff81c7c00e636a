"""What the study is about, how large it is, and one pair of twins with everything that is asked of it.

Every answer and every ranking is kept under a digest of the models, the sizes and what was asked, as soon as
it is whole: an interrupted run goes on. Parts do not know the code that made them: after a change of a
method, remove the folder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from guard.cache import digest_of
from guard.checkpoint import Checkpoint
from guard.locate.causal import refusal_cost
from guard.locate.change import Text
from guard.locate.decoding import greedy
from guard.locate.results import versions
from guard.locate.twins import Twin
from guard.prompts import Tokens
from guard.sites import ModelShape
from models.recipe.locate.helpful import factors
from models.recipe.locate.helpful import texts as real_texts
from models.recipe.locate.study import RECIPIENT
from models.recipe.parts import part
from models.recipe.patching.prompts import ROLES, draw, tokens

BATCH = 4096


class Pair(NamedTuple):
    """An unaligned model and the (IA)³ vector that makes its aligned twin."""

    name: str
    vector: str
    """File of the vector, in the folder of the weights."""
    about: str


PAIRS = (
    Pair("planted", "ia3-planted.safetensors", "co-adapted: weights and 256 neurons were trained together"),
    Pair("dense", "ia3-dense.safetensors", "plainly trained, on weights that had been co-adapted before"),
    Pair("first", "ia3-dense.safetensors", "plainly trained, on the base as it was before co-adaptation"),
)


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    locate: int = 160
    """Harmful prompts that units are located with."""
    score_tokens: int = 28
    """Longest answer over which change scores are taken."""
    dev_harmful: int = 120
    """Harmful dev prompts that settings are chosen on, and benign ones."""
    dev_benign: int = 60
    harmful: int = 330
    """Harmful test prompts; fewer where a source has fewer than its share."""
    benign: int = 120
    hard: int = 100
    """Benign prompts in the words of harmful ones."""
    texts: int = 80
    """Real answers to benign requests, and as many of the recipient's own, whose likelihood is measured."""
    new_tokens: int = 12
    """Longest answer that is judged: the lab models refuse with a sentence of eleven tokens."""
    shares: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1, 0.2, 1.0)
    """Of the neurons of all layers but the last."""
    draws: int = 3
    """Random controls of each set."""


@dataclass(frozen=True)
class Lab:
    """One pair, loaded once. Twins share their weights, as they do in the engine."""

    pair: Pair
    data: Path
    weights: Path
    """Folder of the unaligned model and of the vector."""
    store: Path
    size: Size

    def part(self, key: Any, compute: Callable[[], Any]) -> Any:
        """A JSON document: read back, or computed now and kept."""
        return part(self.store, [key, self._identity], compute)

    @cached_property
    def _identity(self) -> str:
        """A digest of models, prompts, sizes and versions: what every part depends on."""
        prompts = {role: self.prompts(role) for role in ROLES}
        models = [self.pair.name, self.checkpoint.weights_sha256, self.vector.tolist()]
        return digest_of([models, prompts, asdict(self.size), versions()])

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The unaligned model; its twin has no checkpoint of its own."""
        return Checkpoint.open(self.weights, RECIPIENT)

    @property
    def shape(self) -> ModelShape:
        """Sizes of the models."""
        return self.checkpoint.shape

    @cached_property
    def vector(self) -> NDArray[np.float32]:
        """The aligned twin's factors ``[layers, mlp_width]``."""
        table = np.ones((self.shape.layers, self.shape.mlp_width), dtype=np.float32)
        for layer, row in factors(self.weights / self.pair.vector).items():
            table[layer] = row.numpy()
        return table

    @cached_property
    def recipient(self) -> Twin:
        """The unaligned twin."""
        return Twin(self.checkpoint.load_model())

    @cached_property
    def donor(self) -> Twin:
        """The aligned twin, of the same weights."""
        return Twin(self.recipient.model, factors(self.weights / self.pair.vector))

    @cached_property
    def refusals(self) -> Any:
        """0 for a refusal, 1 for any other answer."""
        return refusal_cost(self.checkpoint.load_tokenizer())

    def prompts(self, role: str) -> list[Tokens]:
        """The prompts of a role as token ids."""
        if role not in self._prompts:
            count = getattr(self.size, role.replace(" ", "_"))
            self._prompts[role] = tokens(self.checkpoint, draw(self.data, role, count))
        return self._prompts[role]

    @cached_property
    def _prompts(self) -> dict[str, list[Tokens]]:
        return {}

    @cached_property
    def texts(self) -> dict[str, list[Text]]:
        """Benign requests with answers: those of their sources, and the unaligned twin's own."""
        own = self.prompts("benign")[: self.size.texts]
        answers = greedy(self.recipient, own, new_tokens=28, batch_tokens=BATCH)
        said = [(prompt, answer) for prompt, answer in zip(own, answers, strict=True) if answer]
        return {"real": real_texts(self.data, self.weights, self.size.texts), "own": said}


def judged(lab: Lab, role: str, answers: Sequence[Tokens]) -> list[int]:
    """1 for each prompt of a role that was answered, 0 for each that was refused."""
    return [int(cost) for cost in lab.refusals(lab.prompts(role), answers)]


def about(lab: Lab) -> dict[str, Any]:
    """What the prompts of each role are."""
    return {role: {"about": ROLES[role].about, "prompts": len(lab.prompts(role)),
                   "sources": [source.name for source in ROLES[role].sources]} for role in ROLES}  # fmt: skip
