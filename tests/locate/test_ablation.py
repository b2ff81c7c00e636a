"""Switching heads off inside a model, and doing so for all heads of a model in one sweep."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch

from guard.capture import pad
from guard.locate.ablation import Ablation, Head, ablated, mixing_weights, replacements
from guard.locate.errors import LocateError
from guard.locate.head_sweep import HeadSweep
from guard.sites import shape_of
from tests.locate.heads_toys import KINDS, SOFTENED, prompts, random_model

HEAD = Head(1, 2)


@torch.inference_mode()
def final(model: Any, rows: list[tuple[int, ...]], side: str = "right") -> torch.Tensor:
    """Final states at the last tokens of padded rows, by the model's own forward."""
    if model.config._attn_implementation == "eager" and len(rows) > 1:
        # In float64 it fills rows that see nothing with NaN, which spreads from the padding.
        return torch.cat([final(model, [row]) for row in rows])
    ids, mask, last = pad(rows, side=side)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = model.base_model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    state: torch.Tensor = found.last_hidden_state[torch.arange(len(rows)), last]
    return state


def output_of_attention(model: Any, row: tuple[int, ...], layer: int) -> torch.Tensor:
    """The input of o_proj as heads, ``[tokens, heads, head_dim]``."""
    seen: list[torch.Tensor] = []
    module = model.model.layers[layer].self_attn.o_proj
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    with torch.inference_mode():
        model(input_ids=torch.tensor([row]), use_cache=False)
    handle.remove()
    return seen[0].unflatten(-1, (4, -1))


def running_mean(model: Any, row: tuple[int, ...], head: Head) -> torch.Tensor:
    """Mean of the values so far, ``[tokens, head_dim]``, in a loop."""
    seen: list[torch.Tensor] = []
    handle = model.model.layers[head.layer].self_attn.v_proj.register_forward_hook(
        lambda _module, _inputs, output: seen.append(output[0])
    )
    with torch.inference_mode():
        model(input_ids=torch.tensor([row]), use_cache=False)
    handle.remove()
    values = seen[0].unflatten(-1, (2, -1))[:, head.head // 2]
    return torch.stack([values[: t + 1].mean(0) for t in range(len(row))])


@pytest.mark.parametrize("kind", ["llama", "qwen3", "olmo2"])
def test_scaled_queries_tend_to_the_running_mean_of_values_linearly(kind: str) -> None:
    model, (row,) = random_model(kind), prompts(11)
    expected = running_mean(model, row, HEAD)
    errors = []
    for epsilon in (1e-3, 1e-4, 1e-5):
        with ablated(model, [HEAD], epsilon=epsilon):
            got = output_of_attention(model, row, HEAD.layer)[:, HEAD.head]
        errors.append(float((got - expected).abs().max()))
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(10, rel=0.05)
    assert errors[2] < 1e-4


def test_ablation_touches_one_query_head_and_not_its_neighbour_in_the_group() -> None:
    model, (row,) = random_model(), prompts(11)
    before = output_of_attention(model, row, HEAD.layer)
    kinds: tuple[Ablation, ...] = ("undifferentiated", "scaling")
    for kind in kinds:
        with ablated(model, [HEAD], kind):
            after = output_of_attention(model, row, HEAD.layer)
        changed = (before != after).any(-1).any(0)
        # The site's hook is registered later, so it sees what scaling has left.
        assert changed.tolist() == [False, False, True, False]
    torch.testing.assert_close(output_of_attention(model, row, HEAD.layer), before, rtol=0, atol=0)


def test_scaling_by_zero_is_a_slice_of_zeros() -> None:
    model, rows = random_model(), prompts(9)

    def cut(_module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        changed = inputs[0].clone()
        changed[..., 2 * 8 : 3 * 8] = 0.0
        return (changed,)

    with ablated(model, [HEAD], "scaling", epsilon=0.0):
        scaled = final(model, rows)
    handle = model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(cut)
    expected = final(model, rows)
    handle.remove()
    torch.testing.assert_close(scaled, expected, rtol=0, atol=0)


def test_uniform_attention_covers_the_visible_keys_of_a_window() -> None:
    window = torch.tensor([[0.0, -1e9, -1e9], [0.0, 0.0, -1e9], [-1e9, 0.0, 0.0]])[None, None]
    expected = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.0, 0.5, 0.5]])
    assert torch.equal(mixing_weights(window, 3, window.device, torch.float32), expected)
    assert torch.equal(mixing_weights(window == 0, 3, window.device, torch.float32), expected)


def test_means_of_low_precision_values_are_rounded_once() -> None:
    values = torch.randn(1, 64, 2, 8, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    means = replacements("undifferentiated", values, values, None)
    exact = values.double().cumsum(1) / torch.arange(1, 65)[:, None, None]
    # Weights in bfloat16 would be off by up to half a unit in the last place themselves.
    assert float((means != exact.to(torch.bfloat16)).float().mean()) < 0.01


@pytest.mark.parametrize("off", ["undifferentiated", "scaling"])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_sweep_equals_one_forward_pass_for_each_head(kind: str, off: Ablation) -> None:
    model, rows = random_model(kind), prompts(3, 12, 7, 12, 1)
    # An ε this small is no longer seen in float64.
    epsilon = 1e-12 if off == "undifferentiated" else 0.25
    precision = 1e-4 if kind in SOFTENED else 1e-9
    sweep = HeadSweep(model, rows, batch_tokens=40)
    for side in ("right", "left"):
        torch.testing.assert_close(sweep.vanilla, final(model, rows, side), rtol=precision, atol=precision)
    swept = dict(sweep.layers(off, epsilon=epsilon))
    assert sorted(swept) == [0, 1, 2]
    for layer, head in product(range(3), range(4)):
        with ablated(model, [Head(layer, head)], off, epsilon=epsilon):
            one_by_one = final(model, rows, "left" if head % 2 else "right")
        torch.testing.assert_close(swept[layer][head], one_by_one, rtol=precision, atol=precision)
    logits = sweep.logits(sweep.vanilla)
    with torch.inference_mode():
        expected = torch.stack([model(torch.tensor([row])).logits[0, -1] for row in rows])
    torch.testing.assert_close(logits, expected, rtol=precision, atol=precision)


@pytest.mark.parametrize("off", ["undifferentiated", "scaling"])
def test_sweep_on_top_of_a_group_ablates_the_group_below_beside_and_above(off: Ablation) -> None:
    model, rows = random_model(), prompts(5, 8, 8)
    group = [Head(0, 3), Head(1, 0), Head(2, 1)]
    swept = dict(HeadSweep(model, rows).layers(off, epsilon=0.0, group=group))
    for layer, head in product(range(3), range(4)):
        with ablated(model, {*group, Head(layer, head)}, off, epsilon=0.0):
            expected = final(model, rows)
        torch.testing.assert_close(swept[layer][head], expected, rtol=1e-9, atol=1e-9)


def test_layers_that_are_skipped_change_nothing_for_the_others() -> None:
    model, rows = random_model(), prompts(5, 8)
    whole = dict(HeadSweep(model, rows).layers("scaling"))
    part = dict(HeadSweep(model, rows).layers("scaling", skip=[0, 2]))
    assert list(part) == [1]
    assert torch.equal(part[1], whole[1])


def test_sweep_runs_half_the_blocks_of_a_pass_for_each_head() -> None:
    sweep = HeadSweep(random_model(), prompts(10))
    # The pass that variants begin from, and a pass of the whole model to hold it against.
    assert sweep.block_tokens == 10 * 3 + 10 * 3
    list(sweep.layers("undifferentiated"))
    # For the 4 heads of layers 0 and 1 the blocks from there on; in the last layer, where attention is known,
    # only the last token.
    variants = 4 * (10 * (3 + 2) + 1)
    assert sweep.block_tokens == 2 * 10 * 3 + variants
    # A group changes nothing below its lowest layer, here 1.
    list(sweep.layers("undifferentiated", group=[Head(2, 0), Head(1, 3)]))
    assert sweep.block_tokens == 2 * 10 * 3 + 2 * variants + 10 * 2


@pytest.mark.parametrize("kind", ["undifferentiated", "scaling"])
@pytest.mark.parametrize("group", [(), (Head(2, 0), Head(1, 3)), (Head(0, 1),)])
def test_what_is_not_kept_is_computed_again_to_the_same(kind: Any, group: Sequence[Head]) -> None:
    kept, forgotten = (HeadSweep(random_model(), prompts(9, 4, 9), keep_bytes=n) for n in (1 << 20, 0))
    for (layer, states), (other, again) in zip(
        kept.layers(kind, group=group), forgotten.layers(kind, group=group), strict=True
    ):
        assert layer == other
        assert torch.equal(states, again)
    assert forgotten.block_tokens == kept.block_tokens + 22 * min([3, *(head.layer for head in group)])


def test_no_row_is_padded() -> None:
    model = random_model()
    model.model.embed_tokens.weight[0] = float("nan")
    for _, states in HeadSweep(model, prompts(2, 3, 9)).layers("undifferentiated"):
        assert bool(states.isfinite().all())


def test_ablated_generation_with_a_cache_equals_one_without() -> None:
    model, (row,) = random_model(), prompts(9)
    plain = model.generate(torch.tensor([row]), max_new_tokens=8, do_sample=False, eos_token_id=None)
    with ablated(model, [HEAD, Head(0, 1)]):
        cached = model.generate(torch.tensor([row]), max_new_tokens=8, do_sample=False, eos_token_id=None)
        written = list(row)
        for _ in range(8):
            with torch.inference_mode():
                written.append(int(model(torch.tensor([written])).logits[0, -1].argmax()))
    assert cached[0].tolist() == written
    assert cached.tolist() != plain.tolist()


def test_hooks_and_weights_are_as_before() -> None:
    model, rows = random_model(), prompts(6)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = final(model, rows)
    list(HeadSweep(model, rows).layers("undifferentiated"))
    with pytest.raises(RuntimeError, match="stop"), ablated(model, [HEAD]):
        raise RuntimeError("stop")
    assert torch.equal(final(model, rows), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    for module in model.modules():
        assert "forward" not in module.__dict__
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_low_precision_model_is_swept_in_its_own_dtype_and_scored_in_float32() -> None:
    rows = prompts(6, 6)
    exact = HeadSweep(random_model(), rows)
    half = HeadSweep(random_model().to(torch.bfloat16), rows)
    for (_, wide), (_, narrow) in zip(exact.layers("scaling"), half.layers("scaling"), strict=True):
        assert narrow.dtype == torch.bfloat16
        torch.testing.assert_close(narrow.double(), wide, rtol=0.3, atol=0.3)
    assert half.logits(half.vanilla).dtype == torch.float32


def test_what_cannot_be_swept_is_refused() -> None:
    model = random_model()
    with pytest.raises(LocateError, match="no prompt"):
        HeadSweep(model, [])
    with pytest.raises(LocateError, match="no prompt, or an empty one"):
        HeadSweep(model, [(1, 2), ()])
    with pytest.raises(LocateError, match="65 tokens, but the model's context holds 64"):
        HeadSweep(model, prompts(65))
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(LocateError, match="attention is 'flash_attention_2'"):
        HeadSweep(model, prompts(5))
    broken = random_model()
    broken.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(LocateError, match="states are not finite at layer 2"):
        HeadSweep(broken, prompts(5))


def test_attention_that_is_not_a_mean_of_values_is_refused() -> None:
    model = random_model()
    attention = model.model.layers[1].self_attn
    attention.o_proj.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 2.0,))
    with pytest.raises(LocateError, match="layer 1: the first token's heads do not give its own values"):
        list(HeadSweep(model, prompts(5)).layers("undifferentiated"))


def test_model_with_more_than_its_blocks_is_refused() -> None:
    class Doubled(torch.nn.Module):
        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return inner(states) if states.shape[1] == 1 else 2.0 * inner(states)

    model = random_model()
    inner = model.model.norm
    model.model.norm = Doubled()
    with pytest.raises(LocateError, match="one by one do not give what the model gives as a whole"):
        list(HeadSweep(model, prompts(5)).layers("undifferentiated"))


def test_shapes_of_toys_have_grouped_heads() -> None:
    for kind in KINDS:
        config = random_model(kind).config
        assert shape_of(config).heads == 2 * config.num_key_value_heads
