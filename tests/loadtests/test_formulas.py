"""The formulas of docs/scaling.md against what the engine allocates and runs."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from guard import patch as patches
from guard.patch_card import PatchSite
from guard.scorer import ProbeKind
from loadtests.scale.formulas import Rank, patch_memory, step
from tests.engine import tapped
from tests.engine.tapped import CAPACITY, SPANS, Model

pytestmark = [  # vLLM and its dependencies warn a lot
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error:::guard"),
]
KINDS: tuple[ProbeKind, ...] = ("linear", "mlp", "product")
VIEWS = ("slice", "select", "unsqueeze", "unbind", "expand", "view", "t", "detach", "lift_fresh")
ENDING = 2
"""Of the prompts in ``SPANS``."""
DTYPES = (torch.float32, torch.bfloat16)


class Operations(TorchDispatchMode):
    """Notes what is computed or copied; a view is neither."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func._schema.name.partition("::")[2]
        if name not in VIEWS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def asked(kind: ProbeKind, dtype: torch.dtype, ranks: int = 1, rank: int = 0) -> Rank:
    """What the toy bundle asks of a rank, counted from the bundle alone."""
    bundle, held, places = tapped.bundle(kind), 0, 0
    for site in bundle.card.sites:
        width = bundle.card.model.shape.width(site.kind) // ranks
        here = [c for c in bundle.card.columns(site) if rank * width <= c < (rank + 1) * width]
        held, places = held + len(here), places + bool(here)
    outputs = len(bundle.scorer.bias)
    return Rank(held, places, CAPACITY, dtype.itemsize, probe=kind, outputs=outputs, on_host=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("ranks", "rank"), [(1, 0), (2, 0), (2, 1)])
def test_memory_is_what_the_taps_allocate(kind: ProbeKind, dtype: torch.dtype, ranks: int, rank: int) -> None:
    taps = tapped.make(Model(ranks, rank), tapped.bundle(kind), replayed=True, dtype=dtype, rank=rank)
    assert asked(kind, dtype, ranks, rank).memory == taps.bytes


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_is_what_the_patch_tables_allocate(dtype: torch.dtype) -> None:
    from guard.engine.patches import Patches

    shape, bundle = tapped.MODEL.shape, tapped.bundle()
    wide = PatchSite(layer=2, kind="mlp", units=tuple(range(tapped.MLP)))
    narrow = PatchSite(layer=0, kind="mlp", units=(0, 3, 20))
    for name, sites in (("zero", (narrow, wide)), ("less", (wide,))):
        bundle = bundle.with_patch(patches.stored(name, sites, shape, scale=0.5))
    table = Patches(bundle, Model(), max_tokens=64, dtype=dtype, device=torch.device("cpu"), replayed=False)
    assert table.bytes == patch_memory([3, tapped.MLP], patches=2, tokens=64, element=dtype.itemsize)


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("replayed", [False, True])
def test_step_runs_the_operations_and_multiplications_it_is_said_to(
    kind: ProbeKind, dtype: torch.dtype, replayed: bool
) -> None:
    model, plain, x = Model().to(dtype), Model().to(dtype), tapped.rows(SPANS).to(dtype)
    taps = tapped.make(model, tapped.bundle(kind), replayed=replayed, dtype=dtype)
    with FlopCounterMode(display=False) as without, Operations() as before:
        plain(x)
    with FlopCounterMode(display=False) as flops, Operations() as ran:
        taps.begin()
        taps.stage(tapped.layout(SPANS))
        model(x)
        taps.score()
    said = step(asked(kind, dtype), ENDING, len(x), replayed=replayed)
    assert len(ran.names) - len(before.names) == said.operations
    # The counter leaves out products with a vector, as the formula does.
    assert flops.get_total_flops() - without.get_total_flops() == said.flops


@torch.no_grad()
@pytest.mark.parametrize("replayed", [False, True])
def test_step_in_which_no_prompt_ends_reads_only_where_it_is_replayed(replayed: bool) -> None:
    spans = [(12, 1, 9), (20, 1, 9)]
    model, plain, x = Model(), Model(), tapped.rows(spans)
    taps = tapped.make(model, tapped.bundle(), replayed=replayed)
    with Operations() as before:
        plain(x)
    with Operations() as ran:
        taps.begin()
        taps.stage(tapped.layout(spans))
        model(x)
        assert taps.score() is None
    said = step(asked("linear", torch.float32), 0, len(x), replayed=replayed)
    assert len(ran.names) - len(before.names) == said.operations == (4 if replayed else 0)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_add_up_one_number_for_each_output_of_each_ending_prompt(kind: ProbeKind) -> None:
    sent: list[int] = []

    def all_reduce(x: torch.Tensor) -> torch.Tensor:
        sent.append(x.numel() * x.element_size())
        return x

    model = Model(2, 0)
    taps = tapped.make(model, tapped.bundle(kind), replayed=False, all_reduce=all_reduce)
    taps.begin()
    taps.stage(tapped.layout(SPANS))
    taps.score()
    said = step(asked(kind, torch.float32, 2), ENDING, 15, replayed=False, ranks=2)
    assert sent == [said.reduced]
