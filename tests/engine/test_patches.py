"""Patch tables on small torch modules: what they change, what they leave alone, what is read beside them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from guard import patch as patches
from guard.bundle import Bundle
from guard.engine.errors import GuardStartupError
from guard.patch_card import PatchSite
from tests.engine import tapped
from tests.engine.tapped import HIDDEN, MLP, SPANS, Model

pytestmark = [  # vLLM and its dependencies warn a lot
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error:::guard"),
]
SHAPE = tapped.MODEL.shape
SITES = (
    PatchSite(layer=0, kind="mlp", units=(0, 3, 20)),
    PatchSite(layer=1, kind="attention", units=(1, 3)),
    PatchSite(layer=2, kind="mlp", units=tuple(range(MLP))),
)
STEER = np.linspace(-1, 1, HIDDEN, dtype=np.float32)


def made() -> Bundle:
    columns = sum(len(site.columns(SHAPE)) for site in SITES)
    rng = np.random.default_rng(1)
    bundle = tapped.bundle()
    for patch in (
        patches.stored("zero", SITES, SHAPE, scale=0.0),
        patches.stored(
            "factors", SITES[:2], SHAPE, scale=rng.uniform(0, 2, columns - MLP).astype(np.float32)
        ),
        patches.steering("steer", STEER, [1], SHAPE, strength=2.0),
    ):
        bundle = bundle.with_patch(patch)
    return bundle


def install(model, bundle, *, replayed=False, rank=0):
    from guard.engine.patches import Patches

    return Patches(
        bundle,
        model,
        max_tokens=64,
        dtype=torch.float32,
        device=torch.device("cpu"),
        replayed=replayed,
        rank=rank,
    )


@torch.no_grad()
def run(table, model, slots, x):
    table.begin(slots)
    table.stage(tapped.layout(SPANS))
    out = model(x.clone())
    table.clear()
    return out


@torch.no_grad()
def reference(patch, x):
    """The toy model by hand, every row under one patch."""
    model = Model()
    parts = [] if patch is None else list(patch.parts(SHAPE))

    def change(value, layer, kind):
        for site, columns, part in parts:
            if (site.layer, site.kind) == (layer, kind):
                value = value.clone()
                scale, shift = (torch.from_numpy(patch.arrays[name][part]) for name in ("scale", "shift"))
                value[:, columns] = value[:, columns] * scale + shift
        return value

    for number, layer in enumerate(model.model.layers):
        seen = change(torch.tanh(layer.qkv(x)), number, "attention")
        x = x + layer.self_attn.o_proj(seen)
        seen = change(torch.relu(layer.up(x)), number, "mlp")
        x = x + change(layer.mlp.down_proj(seen), number, "residual")
    return x


@pytest.mark.parametrize("replayed", [False, True])
@pytest.mark.parametrize(
    "slots",
    [
        {},
        {"r1": 1},
        {"r0": 2, "r3": 2},
        {"r0": 1, "r1": 2, "r2": 3, "r3": 1},
        dict.fromkeys(("r0", "r1", "r2", "r3"), 3),
    ],
)
def test_each_request_is_changed_by_its_own_patch_alone(replayed, slots):
    bundle, model, x = made(), Model(), tapped.rows(SPANS)
    table = install(model, bundle, replayed=replayed)
    by_slot = [None, *bundle.patches.values()]
    for asked in ({"r2": 1, "r3": 3}, slots, {}, slots):  # what an earlier step did is forgotten
        out, begin = run(table, model, asked, x), 0
        for number, (_, scheduled, _) in enumerate(SPANS):
            rows = slice(begin, begin + scheduled)
            expected = reference(by_slot[asked.get(f"r{number}", 0)], x)[rows]
            torch.testing.assert_close(out[rows], expected, rtol=1e-5, atol=1e-5)
            begin += scheduled


@pytest.mark.parametrize("replayed", [False, True])
def test_rows_that_are_not_patched_are_untouched_to_the_bit(replayed):
    bundle, model, x = made(), Model(), tapped.rows(SPANS)
    expected = run(install(Model(), tapped.bundle()), Model(), {}, x)
    out = run(install(model, bundle, replayed=replayed), model, {"r3": 1}, x)
    last = SPANS[-1][1]
    assert torch.equal(out[:-last], expected[:-last])
    assert not torch.equal(out[-last:], expected[-last:])


@pytest.mark.parametrize("replayed", [False, True])
def test_a_forward_pass_that_nobody_staged_is_not_patched_by_an_earlier_step(replayed):
    bundle, model, x = made(), Model(), tapped.rows(SPANS)
    table = install(model, bundle, replayed=replayed)
    run(table, model, {"r0": 1, "r3": 2}, x)
    table.begin(None)
    table.stage(tapped.layout(SPANS))
    with torch.no_grad():
        assert torch.equal(model(x.clone()), Model()(x.clone()))


def test_a_layer_is_read_before_it_is_changed():
    """The probe sees what the model made of the patched layers below."""
    bundle, model, x = made(), Model(), tapped.rows(SPANS)
    taps = tapped.make(model, bundle, replayed=False)
    table = install(model, bundle)
    slots = dict.fromkeys(("r1", "r3"), 1)
    table.begin(slots)
    table.stage(tapped.layout(SPANS))
    scores = tapped.step(taps, model, SPANS, x)
    patch = bundle.patches["zero"]

    def below(site):
        kept = [p for p in patch.card.sites if (p.layer, p.kind == "mlp") < (site.layer, site.kind == "mlp")]
        return patches.stored("below", kept, SHAPE, scale=0.0) if kept else None

    for request, row in (("r1", 6), ("r3", 14)):
        read = []
        for site in bundle.card.sites:
            changed = Model()
            if (lower := below(site)) is not None:
                table = install(changed, tapped.bundle().with_patch(lower))
                table.begin(dict.fromkeys(("r0", "r1", "r2", "r3"), 1))
                table.stage(tapped.layout(SPANS))
            plain = tapped.Reference(changed)
            read.append(plain.inputs(x.clone())[site.kind, site.layer][row, bundle.card.columns(site)])
        expected = float(bundle.logits(torch.cat(read).numpy()[None])[0])
        assert scores[request] == pytest.approx(expected, abs=1e-5)


def test_ranks_hold_the_columns_that_are_theirs():
    bundle = made()
    for rank in range(2):
        model = Model(ranks=2, rank=rank)
        install(model, bundle, rank=rank)
        layers = model.model.layers
        half = MLP // 2
        table = layers[0].mlp.down_proj.neuronguard_patch_mlp
        assert table.columns.tolist() == [c - rank * half for c in (0, 3, 20) if c // half == rank]
        assert layers[2].mlp.down_proj.neuronguard_patch_mlp.columns.tolist() == list(range(half))


def test_an_architecture_with_a_norm_behind_its_mlp_cannot_be_steered():
    bundle = made()
    card = bundle.card.model_copy(
        update={"model": bundle.card.model.model_copy(update={"architecture": "Gemma2ForCausalLM"})}
    )
    with pytest.raises(GuardStartupError, match="steers the residual stream of a Gemma2ForCausalLM"):
        install(Model(), Bundle(card, bundle.scorer, bundle.patches.values()))
