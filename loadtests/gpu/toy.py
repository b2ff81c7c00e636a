"""A small torch model with the layers that a bundle names, a bundle for it, and its steps by plain torch."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from guard.bundle import Bundle, Calibration, DataFile, GuardCard, ModelCard, SelfTest, Site
from guard.engine.staging import Layout
from guard.scorer import Scorer
from guard.verdict import Threshold

HIDDEN, WIDTH, HEADS, HEAD_DIM, LAYERS = 64, 176, 4, 32, 3
SITES = (
    Site(layer=0, kind="mlp", units=(0, 5, 17, 100, 175)),
    Site(layer=1, kind="attention", units=(1, 3)),
    Site(layer=2, kind="mlp", units=tuple(range(0, 176, 11))),
)


class Layer(nn.Module):
    """Projections with the names of a Llama layer; no attention, since only rows matter here."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        self.qkv = nn.Linear(HIDDEN, HEADS * HEAD_DIM)
        self.self_attn.o_proj = nn.Linear(HEADS * HEAD_DIM, HIDDEN)
        self.up = nn.Linear(HIDDEN, WIDTH)
        self.mlp.down_proj = nn.Linear(WIDTH, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states ``[tokens, HIDDEN]``."""
        attention: Any = self.self_attn
        mlp: Any = self.mlp
        x = x + attention.o_proj(torch.tanh(self.qkv(x)))
        out: Tensor = x + mlp.down_proj(torch.nn.functional.silu(self.up(x)))
        return out


class Toy(nn.Module):
    """Layers in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states ``[tokens, HIDDEN]``."""
        model: Any = self.model
        for layer in model.layers:
            x = layer(x)
        return x


class Step(NamedTuple):
    """One batch: its hidden states, its layout, and what each prompt that ends in it must score."""

    x: Tensor
    layout: Layout
    logits: dict[str, float]


def make(device: str, dtype: torch.dtype) -> Toy:
    """The model, always with the same weights."""
    torch.manual_seed(0)
    return Toy().to(device, dtype).eval()


def make_bundle() -> Bundle:
    """A linear probe with random weights."""
    card = GuardCard(
        model=ModelCard(
            name="toy",
            architecture="LlamaForCausalLM",
            layers=LAYERS,
            mlp_width=WIDTH,
            heads=HEADS,
            head_dim=HEAD_DIM,
            weights_sha256="0" * 64,
            tokenizer_sha256="0" * 64,
        ),
        label="unsafe_output",
        prompt_tails=(),
        sites=SITES,
        probe="linear",
        calibration=Calibration(slope=1.0, offset=0.0),
        thresholds=(
            Threshold(false_positive_rate=0.01, probability=0.5, logit=0.0, benign=100, upper95=0.1),
        ),
        default_false_positive_rate=0.01,
        data=(DataFile(name="random", sha256="0" * 64, role="fit", harmful=0, benign=0),),
        metrics={},
        self_test=SelfTest(prompts=((1,),), logits={"float32": (0.0,)}, tolerance={"float32": 1.0}),
        created={},
    )
    weight = np.random.default_rng(0).standard_normal(card.features).astype(np.float32)
    return Bundle(card, Scorer.linear(weight, 0.1))


def layout(rng: np.random.Generator, tokens: int, most: int, turn: int) -> Layout:
    """Up to ``most`` requests that share ``tokens`` rows; some end their prompts, some decode or go on."""
    n = int(rng.integers(1, min(most, tokens) + 1))
    cuts = np.sort(rng.choice(np.arange(1, tokens), n - 1, replace=False))
    start = np.array([0, *cuts, tokens])
    computed = rng.integers(0, 50, n)
    prompt = computed + np.diff(start) + rng.integers(-3, 2, n)
    return Layout([f"{turn}-{i}" for i in range(n)], start, computed, np.maximum(prompt, 1))


@torch.no_grad()
def steps(
    model: Toy, bundle: Bundle, tokens: int, count: int, most: int, device: str, seed: int
) -> list[Step]:
    """Random batches with their scores, by hooks written here. ``model`` must have no taps."""
    rng, made = np.random.default_rng(seed), []
    dtype = next(model.parameters()).dtype
    for turn in range(count):
        x = torch.from_numpy(rng.standard_normal((tokens, HIDDEN)).astype(np.float32)).to(device, dtype)
        batch = layout(rng, tokens, most, turn)
        logits = bundle.logits(_features(model, x))
        made.append(Step(x, batch, {rid: float(logits[row]) for rid, row in _ends(batch)}))
    return made


def _ends(batch: Layout) -> list[tuple[str, int]]:
    """Row of each final prompt token, found by walking over all positions."""
    found = []
    for i, rid in enumerate(batch.request_ids):
        for position, row in enumerate(range(batch.start[i], batch.start[i + 1]), int(batch.computed[i])):
            if position == batch.prompt[i] - 1:
                found.append((rid, row))
    return found


def _features(model: Toy, x: Tensor) -> NDArray[np.float32]:
    seen: list[Tensor] = []
    handles = []
    inner: Any = model.model
    for site in SITES:
        layer = inner.layers[site.layer]
        module = layer.mlp.down_proj if site.kind == "mlp" else layer.self_attn.o_proj
        wide = 1 if site.kind == "mlp" else HEAD_DIM
        columns = [unit * wide + i for unit in site.units for i in range(wide)]
        handles.append(
            module.register_forward_pre_hook(lambda m, a, c=columns: seen.append(a[0][:, c].float().cpu()))
        )
    model(x)
    for handle in handles:
        handle.remove()
    values: NDArray[np.float32] = torch.cat(seen, dim=1).numpy()
    return values
