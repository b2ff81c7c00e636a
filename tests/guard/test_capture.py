from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from guard.bundle import Site
from guard.capture import CaptureError, batches, capture, pad, read_batch, read_prompts
from guard.sites import UnsupportedArchitectureError
from tests.guard import worlds

SITES = (
    Site(layer=0, kind="mlp", units=(0, 7, 47)),
    Site(layer=1, kind="attention", units=(1, 3)),
    Site(layer=2, kind="mlp", units=tuple(range(48))),
)
PROMPTS = [[1, 50, 60, 70, 0, 2], [1, 80, 0, 2], [1, 90, 91, 92, 93, 94, 95, 96, 0, 2], [1, 81, 0, 2]]


def recomputed(model: Any, prompt: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs of every down_proj and o_proj at the last token, from the weights alone, in float64.

    Norms and rotary angles are float32 in transformers whatever the model's dtype, and so they are here.
    """
    weights, config = model.state_dict(), model.config
    heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    theta = config.rope_parameters["rope_theta"]

    def norm(x: Tensor, name: str) -> Tensor:
        short = x.float()
        short = short * torch.rsqrt(short.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps)
        return short.double() * weights[name]

    def rotated(x: Tensor) -> Tensor:
        frequency = 1.0 / theta ** (torch.arange(0, width, 2).float() / width)
        angle = torch.outer(torch.arange(len(prompt)).float(), frequency)
        cos, sin = torch.cos(angle).double(), torch.sin(angle).double()
        first, second = x[..., : width // 2], x[..., width // 2 :]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    hidden = weights["model.embed_tokens.weight"][torch.tensor(prompt)]
    post, mixed = [], []
    for layer in range(config.num_hidden_layers):
        here = f"model.layers.{layer}."
        x = norm(hidden, here + "input_layernorm.weight")
        q, k, v = (x @ weights[f"{here}self_attn.{name}_proj.weight"].T for name in "qkv")
        q, k, v = (y.view(len(prompt), -1, width).transpose(0, 1) for y in (q, k, v))
        if f"{here}self_attn.q_norm.weight" in weights:
            q = norm(q, here + "self_attn.q_norm.weight")
            k = norm(k, here + "self_attn.k_norm.weight")
        k, v = (y.repeat_interleave(heads // kv_heads, 0) for y in (rotated(k), v))
        scores = rotated(q) @ k.transpose(-1, -2) / width**0.5
        scores += torch.full(scores.shape[-2:], -torch.inf, dtype=scores.dtype).triu(1)
        z = (scores.softmax(-1) @ v).transpose(0, 1).reshape(len(prompt), -1)
        hidden = hidden + z @ weights[here + "self_attn.o_proj.weight"].T
        x = norm(hidden, here + "post_attention_layernorm.weight")
        gate = x @ weights[here + "mlp.gate_proj.weight"].T
        a = gate / (1 + torch.exp(-gate)) * (x @ weights[here + "mlp.up_proj.weight"].T)
        hidden = hidden + a @ weights[here + "mlp.down_proj.weight"].T
        post.append(a[-1])
        mixed.append(z[-1])
    return post, mixed


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_features_equal_an_independent_computation(kind: str, side: str) -> None:
    model = worlds.model(kind, dtype=torch.float64)
    read = read_batch(model, SITES, PROMPTS, side=side)
    for row, prompt in zip(read, PROMPTS, strict=True):
        post, mixed = recomputed(model, prompt)
        expected = torch.cat([post[0][[0, 7, 47]], mixed[1][8:16], mixed[1][24:32], post[2]])
        torch.testing.assert_close(row, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_nothing(side: str) -> None:
    model = worlds.model()
    alone = torch.cat([read_batch(model, SITES, [prompt]) for prompt in PROMPTS])
    together = read_batch(model, SITES, PROMPTS, side=side)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_prompts_come_back_in_their_own_order() -> None:
    model = worlds.model()
    whole = read_prompts(model, SITES, PROMPTS, tokens=8)
    assert whole.dtype == np.float32
    assert whole.shape == (4, 3 + 16 + 48)
    for row, prompt in zip(whole, PROMPTS, strict=True):
        np.testing.assert_allclose(row, read_batch(model, SITES, [prompt])[0].numpy(), atol=1e-5)


def test_hooks_are_gone_after_the_block_and_change_no_output() -> None:
    model = worlds.model()
    ids, _, last = pad(PROMPTS[:1])
    before = model(input_ids=ids).logits
    with capture(model, SITES, last):
        during = model(input_ids=ids).logits
    assert torch.equal(before, during)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_forward_that_misses_a_site_is_an_error() -> None:
    with capture(worlds.model(), SITES, torch.tensor([0])) as captured:
        pass
    with pytest.raises(CaptureError, match=r"layers \[0, 1, 2\]"):
        captured.features()


def test_a_site_read_twice_is_an_error() -> None:
    model = worlds.model()
    ids, _, last = pad(PROMPTS[:1])
    with capture(model, SITES, last):
        model(input_ids=ids)
        with pytest.raises(CaptureError, match="read twice"):
            model(input_ids=ids)


def test_an_unknown_architecture_is_named() -> None:
    model = worlds.model()
    model.config.architectures = ["MysteryForCausalLM"]
    with pytest.raises(UnsupportedArchitectureError, match="MysteryForCausalLM"):
        read_batch(model, SITES, PROMPTS)


def test_batches_hold_every_index_once_within_their_limits() -> None:
    lengths = [5, 100, 3, 7, 50, 50, 1]
    groups = batches(lengths, tokens=120, rows=3)
    assert sorted(i for group in groups for i in group) == list(range(7))
    for group in groups:
        assert len(group) <= 3
        assert len(group) == 1 or max(lengths[i] for i in group) * len(group) <= 120


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="empty prompt"):
        read_batch(worlds.model(), SITES, [[1], []])
