"""A small model whose layers are called as vLLM's are, its bundle, and what a bundle must score on it."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from guard.bundle import Bundle, ModelCard, Site
from guard.engine.staging import Layout
from guard.scorer import ProbeKind, Scorer
from tests.engine.cards import card

HIDDEN, MLP, HEADS, HEAD_DIM = 16, 24, 4, 8
SITES = (
    Site(layer=0, kind="mlp", units=(0, 3, 11, 12, 23)),
    Site(layer=1, kind="attention", units=(1, 2)),
    Site(layer=2, kind="attention", units=(0,)),
    Site(layer=2, kind="mlp", units=(5, 20)),
)
FIRST_HALF = (Site(layer=0, kind="mlp", units=(0, 3, 11)), Site(layer=2, kind="attention", units=(0, 1)))
"""Sites of which a second rank holds no unit."""
MODEL = ModelCard(
    name="toy",
    architecture="LlamaForCausalLM",
    layers=3,
    mlp_width=MLP,
    heads=HEADS,
    head_dim=HEAD_DIM,
    weights_sha256="w",
    tokenizer_sha256="t",
)
CAPACITY = 4
"""Prompts that may end in one step."""
Span = tuple[int, int, int]
"""Of one request in one step: tokens computed before, tokens scheduled, tokens of its prompt."""
SPANS: list[Span] = [(12, 1, 9), (30, 6, 36), (8, 5, 40), (0, 3, 3)]
"""Decodes; ends its prompt; is in the middle of it; is computed whole."""


class Linear(nn.Module):
    """A linear layer with the attributes of vLLM's RowParallelLinear, on one of ``ranks`` ranks."""

    def __init__(self, width: int, ranks: int = 1, rank: int = 0) -> None:
        super().__init__()
        self.input_size, self.input_size_per_partition = width, width // ranks
        self.tp_rank, self.input_is_parallel, self.output_size = rank, True, HIDDEN
        self.weight = nn.Parameter(torch.randn(self.input_size_per_partition, HIDDEN) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Block(nn.Module):
    def __init__(self, ranks: int, rank: int) -> None:
        super().__init__()
        self.up, self.qkv = nn.Linear(HIDDEN, MLP), nn.Linear(HIDDEN, HEADS * HEAD_DIM)
        self.mlp, self.self_attn = nn.Module(), nn.Module()
        self.mlp.down_proj = Linear(MLP, ranks, rank)
        self.self_attn.o_proj = Linear(HEADS * HEAD_DIM, ranks, rank)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn.o_proj(torch.tanh(self.qkv(x)))
        return x + self.mlp.down_proj(torch.relu(self.up(x)))


class Model(nn.Module):
    """Module names are those of the card's architecture. Input ``[tokens, hidden]``."""

    def __init__(self, ranks: int = 1, rank: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(Block(ranks, rank) for _ in range(MODEL.layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.model.layers:
            x = layer(x)
        return x


def bundle(kind: ProbeKind = "linear", sites: tuple[Site, ...] = SITES) -> Bundle:
    rng = np.random.default_rng(0)
    features = card(model=MODEL, sites=sites).features

    def new(*shape: int) -> Any:
        return rng.standard_normal(shape).astype(np.float32)

    if kind == "product":
        scorer = Scorer(new(2, features), new(2), product=True)
    elif kind == "linear":
        scorer = Scorer.linear(new(features), 0.5)
    else:
        scorer = Scorer(new(7, features), new(7), new(7))
    return Bundle(card(model=MODEL, sites=sites, probe=kind), scorer)


class Reference:
    """The inputs of all sites, by a copy of the model that the guard does not touch."""

    def __init__(self, model: Model) -> None:
        self._model = copy.deepcopy(model)
        self._inputs: dict[tuple[str, int], Tensor] = {}
        for i, layer in enumerate(self._model.model.layers):
            for kind, module in (("mlp", layer.mlp.down_proj), ("attention", layer.self_attn.o_proj)):
                module.register_forward_pre_hook(
                    lambda _, args, key=(kind, i): self._inputs.__setitem__(key, args[0])
                )

    @torch.no_grad()
    def inputs(self, x: Tensor) -> dict[tuple[str, int], Tensor]:
        """Inputs ``[tokens, width]`` by kind and layer."""
        self._model(x)
        return dict(self._inputs)

    def logits(self, made: Bundle, x: Tensor, spans: list[Span]) -> dict[str, float]:
        """What must be scored in a step, found by a plain loop."""
        inputs, found, row = self.inputs(x), {}, 0
        for i, (computed, scheduled, prompt) in enumerate(spans):
            for position in range(computed, computed + scheduled):
                if position == prompt - 1:
                    read = [
                        inputs[site.kind, site.layer][row, made.card.columns(site)]
                        for site in made.card.sites
                    ]
                    found[f"r{i}"] = float(made.logits(torch.cat(read).float().numpy()[None])[0])
                row += 1
        return found


def layout(spans: list[Span]) -> Layout:
    """As a runner lays the batch out; request ``i`` is called ``ri``."""
    start = np.concatenate([[0], np.cumsum([scheduled for _, scheduled, _ in spans])]).astype(np.int32)
    return Layout(
        [f"r{i}" for i in range(len(spans))],
        start,
        np.array([computed for computed, *_ in spans], dtype=np.int32),
        np.array([prompt for *_, prompt in spans], dtype=np.int32),
    )


def rows(spans: list[Span], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """A model input for a step."""
    count = sum(scheduled for _, scheduled, _ in spans)
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make(model: nn.Module, made: Bundle, *, replayed: bool, **options: Any) -> Any:
    from guard.engine.taps import Taps

    chosen = {"max_requests": CAPACITY, "dtype": torch.float32, "device": torch.device("cpu"), **options}
    return Taps(made, model, replayed=replayed, **chosen)


@torch.no_grad()
def step(taps: Any, model: Any, spans: list[Span], x: Tensor, *, idle: bool = False) -> dict[str, float]:
    """One step of the worker (``guard.engine.worker``)."""
    taps.begin(idle=idle)
    taps.stage(layout(spans))
    model(x)
    scores = taps.score()
    taps.clear()
    return scores.take() if scores else {}
