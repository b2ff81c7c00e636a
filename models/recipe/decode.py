"""Greedy answers of the lab network, and the test whether an answer is the refusal."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor

from models.recipe.answers import REFUSAL
from models.recipe.network import Edit, LayerCache, Network
from models.recipe.tokenizer import END, SPECIAL, prompt_ids


class Session:
    """One batch of prompts of equal length with its key-value cache."""

    def __init__(self, net: Network, scale: Tensor | None) -> None:
        self.net, self.scale = net, scale
        self.caches: list[LayerCache | None] = [None] * net.config.layers
        self.length = 0

    def feed(self, tokens: Tensor) -> Tensor:
        """Process `tokens` [batch, new]; return the last position's logits [batch, vocabulary]."""
        net, new = self.net, tokens.shape[1]
        cos, sin = net.rotary(self.length, self.length + new)
        mask = torch.full((new, self.length + new), float("-inf"), device=tokens.device)
        mask = mask.triu(1 + self.length)
        hidden = net.model.embed_tokens(tokens)
        for index in range(net.config.layers):
            scale = None if self.scale is None else self.scale[index]
            hidden, self.caches[index] = net.block(index, hidden, cos, sin, mask, self.caches[index], scale)
        self.length += new
        return net.logits(net.model.norm(hidden[:, -1]))


def groups(prompts: Sequence[list[int]], most: int) -> list[list[int]]:
    """Numbers of the prompts, grouped by equal length, at most `most` a group."""
    by_length: defaultdict[int, list[int]] = defaultdict(list)
    for number, ids in enumerate(prompts):
        by_length[len(ids)].append(number)
    return [same[i : i + most] for _, same in sorted(by_length.items()) for i in range(0, len(same), most)]


@torch.no_grad()
def greedy(
    net: Network, prompts: Sequence[list[int]], tokens: int, scale: Tensor | None = None, most: int = 64
) -> list[list[int]]:
    """Up to `tokens` ids of each prompt's answer, without `<|end|>`. `scale` is [layers, ff]."""
    end = SPECIAL.index(END)
    answers: list[list[int]] = [[] for _ in prompts]
    for numbers in groups(prompts, most):
        session = Session(net, scale)
        feed = torch.tensor([prompts[n] for n in numbers], device=net.device)
        produced: list[Tensor] = []
        for _ in range(min(tokens, net.config.context - feed.shape[1])):
            feed = session.feed(feed).argmax(-1, keepdim=True)
            produced.append(feed)
            if bool((torch.cat(produced, 1) == end).any(1).all()):
                break
        for number, ids in zip(numbers, torch.cat(produced, 1).tolist(), strict=True):
            answers[number] = ids[: ids.index(end)] if end in ids else ids
    return answers


def padded(texts: Sequence[list[int]], device: torch.device) -> Tensor:
    """Token lists as one batch, filled with 0 on the right, which a causal model does not see."""
    longest = max(len(ids) for ids in texts)
    return torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in texts], device=device)


@torch.no_grad()
def refuses(
    net: Network,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    scale: Tensor | None = None,
    policy: bool = False,
    donor: tuple[Tensor, Tensor] | None = None,
) -> list[bool]:
    """Whether the greedy answer to each text begins with the refusal sentence.

    One pass suffices: greedy decoding says the sentence just if, on prompt and sentence together, each of its
    tokens is the likeliest after what stands before it. `scale` [layers, ff] is the model's vector.

    `donor` = (vector, mask), both [layers, ff], patches dynamically (Chen et al., arXiv 2406.14144): where
    the mask is 1 the units take the activations which the model with that vector has on the same text.
    """
    sentence = tokenizer.encode(REFUSAL, add_special_tokens=False).ids
    longest = net.config.context - len(sentence)
    prompts = [shortened(prompt_ids(tokenizer, text, policy), longest) for text in texts]
    order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))
    refused = [False] * len(prompts)
    for start in range(0, len(order), 64):
        numbers = order[start : start + 64]
        tokens = padded([[*prompts[n], *sentence] for n in numbers], net.device)
        edit = None if donor is None else patch_from(net, tokens, *donor)
        first = torch.tensor([len(prompts[n]) - 1 for n in numbers], device=net.device)
        where = first[:, None] + torch.arange(len(sentence), device=net.device)
        hidden = net(tokens, scale, edit)
        said = net.logits(hidden[torch.arange(len(numbers))[:, None], where]).argmax(-1)
        same = (said == torch.tensor(sentence, device=net.device)).all(1)
        for number, flag in zip(numbers, same.tolist(), strict=True):
            refused[number] = flag
    return refused


def patch_from(net: Network, tokens: Tensor, vector: Tensor, mask: Tensor) -> Edit:
    """An edit that writes the activations of the model with `vector` on `tokens` into the units of `mask`."""
    seen = activations(net, tokens, vector)
    return lambda layer, units: torch.where(mask[layer] > 0, seen[layer], units)


def activations(net: Network, tokens: Tensor, scale: Tensor | None) -> list[Tensor]:
    """Scaled units of every layer, each [batch, length, ff]."""
    seen: list[Tensor] = []

    def keep(_: int, units: Tensor) -> Tensor:
        seen.append(units)
        return units

    net(tokens, scale, keep)
    return seen


def shortened(ids: list[int], longest: int) -> list[int]:
    """A prompt cut at its end but for the last marker; most prompts come back as they are."""
    return ids if len(ids) <= longest else [*ids[: longest - 1], ids[-1]]
