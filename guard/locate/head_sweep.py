"""The final states of a model with each of its heads ablated in turn, without a forward pass for each head.

A head of layer l changes nothing below l, and in l only its own slice of the input of ``o_proj``. So the
unablated model goes through the prompts once, layer by layer, and what its layers saw is kept where memory
allows; at each layer all heads' variants of its attention output are put side by side on the batch axis, and
only the blocks from there on are run for them. Attention of layer l itself is not computed again, and of the
last block all that follows attention runs for the last token alone. A group of heads leaves the layers below
its lowest as they were. Prompts are grouped by length: no row is ever padded.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from guard.locate.ablation import Ablation, Head, attention_of, replacements
from guard.locate.blocks import attention_gives, run_block
from guard.locate.errors import LocateError
from guard.locate.head_record import Bucket, recorded
from guard.prompts import Tokens
from guard.sites import shape_of


class _Off(NamedTuple):
    """How heads are ablated, and which ones are already, whatever the variant."""

    kind: Ablation
    epsilon: float
    group: tuple[Head, ...]

    def members(self, layer: int) -> list[int]:
        """The group's heads in a layer."""
        return [head for at, head in self.group if at == layer]


class _Seen(NamedTuple):
    """One block of the unablated model (or of the one with a group ablated) on one bucket."""

    block_input: Tensor
    """``[rows, tokens, width]``"""
    outputs: Tensor
    """Head outputs, ``[rows, tokens, heads, head_dim]``, before any of this layer is replaced."""
    values: Tensor
    """``[rows, tokens, kv_heads, head_dim]``"""


class HeadSweep:
    """A model, some prompts, and ``vanilla``: the unablated final states at the last prompt token.

    ``model`` is a loaded transformers model with eager or sdpa attention, on any devices, ``prompts`` token
    ids. At most ``batch_tokens`` tokens (one row at least) go through a block at a time. What the layers of
    the unablated model saw is kept if that takes at most ``keep_bytes``, and else computed for every sweep.
    Raises LocateError when the model is none whose blocks can be run one by one, or a prompt does not fit.
    """

    def __init__(
        self, model: Any, prompts: Sequence[Tokens], *, batch_tokens: int = 8192, keep_bytes: int = 1 << 31
    ) -> None:
        self.shape = shape_of(model.config)
        self.block_tokens = 0
        """Tokens that entered a block, summed over blocks: the cost so far."""
        self._model = model
        self._prompts = prompts
        self._batch_tokens = batch_tokens
        self._kv_heads = getattr(model.config, "num_key_value_heads", None) or self.shape.heads
        self._blocks = list(model.base_model.layers)[: self.shape.layers]
        self._attention = [attention_of(model, self.shape, layer) for layer in range(self.shape.layers)]
        self._check()
        self._buckets = recorded(model, self._blocks, prompts, batch_tokens)
        self._seen: list[list[_Seen]] | None = [] if self._bytes() <= keep_bytes else None
        self.vanilla = _finite(self._unablated(), "without any head ablated")
        """``[prompts, width]``, after the final norm, in the model's dtype."""

    def layers(
        self,
        kind: Ablation,
        *,
        epsilon: float = 0.0,
        group: Sequence[Head] = (),
        skip: Collection[int] = (),
    ) -> Iterator[tuple[int, Tensor]]:
        """For each layer that is not skipped, ``(layer, states)``; states are ``[heads, prompts, width]``.

        Row ``h`` is the model without head ``h`` of that layer and without the heads of ``group``.
        Raises LocateError for states that are not finite.
        """
        off, begin = _Off(kind, epsilon, tuple(group)), self._first_changed(group)
        frontier = [
            self._seen[number][begin].block_input
            if self._seen and begin < self.shape.layers
            else bucket.entry
            for number, bucket in enumerate(self._buckets)
        ]
        for layer in range(self.shape.layers):
            wanted = layer not in skip
            states = self.vanilla.new_empty(self.shape.heads if wanted else 0, *self.vanilla.shape)
            for number, bucket in enumerate(self._buckets):
                if layer >= begin:
                    frontier[number], seen = self._step(layer, frontier[number], bucket, off)
                elif wanted and self._seen:
                    seen = self._seen[number][layer]
                if wanted:
                    self._variants(states, layer, seen, bucket, off)
            if wanted:
                yield layer, _finite(states, f"with a head of layer {layer} ablated")

    def _first_changed(self, group: Sequence[Head]) -> int:
        """The layer from which on the model with a group ablated is to be run; below it all is known."""
        if self._seen is None:
            return 0
        return min((head.layer for head in group), default=self.shape.layers)

    @torch.inference_mode()
    def logits(self, states: Tensor) -> Tensor:
        """Next-token logits float32 (float64 of a float64 model) ``[..., vocabulary]`` of final states."""
        head = self._model.get_output_embeddings()
        exact = torch.promote_types(states.dtype, torch.float32)
        weight, bias = head.weight, getattr(head, "bias", None)
        states = states.to(weight.device, exact)
        parts = [states @ rows.to(exact).T for rows in torch.split(weight, 16384)]
        logits = torch.cat(parts, dim=-1)
        logits = logits if bias is None else logits + bias
        cap = getattr(self._model.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _check(self) -> None:
        how = getattr(self._model.config, "_attn_implementation", "eager")
        if how not in ("eager", "sdpa"):
            # Others get no mask that says which keys are visible.
            raise LocateError(f"attention is {how!r}; load the model with attn_implementation eager or sdpa")
        if not self._prompts or not all(self._prompts):
            raise LocateError("there is no prompt, or an empty one; every prompt needs a last token")
        longest, context = max(map(len, self._prompts)), int(self._model.config.max_position_embeddings)
        if longest > context:
            raise LocateError(f"a prompt has {longest} tokens, but the model's context holds {context}")

    def _bytes(self) -> int:
        """Memory that it takes to keep what all layers see."""
        each = self._buckets[0].entry
        width = each.shape[-1] + (self.shape.heads + self._kv_heads) * self.shape.head_dim
        return sum(map(len, self._prompts)) * self.shape.layers * width * each.element_size()

    @torch.inference_mode()
    def _unablated(self) -> Tensor:
        """Final states of the unablated model at the last tokens, block by block, as variants are run."""
        final: list[Tensor] = [torch.empty(0)] * len(self._prompts)
        nothing = _Off("scaling", 1.0, ())
        for bucket in self._buckets:
            hidden, kept = bucket.entry, []
            for layer in range(self.shape.layers):
                hidden, seen = self._step(layer, hidden, bucket, nothing)
                kept.append(seen)
            if self._seen is not None:
                self._seen.append(kept)
            for place, state in zip(bucket.index, self._normed(hidden), strict=True):
                final[place] = state
        states = torch.stack([state.to(final[0].device) for state in final])
        # Rows of the shortest and the longest prompts: windows and masks differ with the length.
        for place in {self._buckets[0].index[0], self._buckets[-1].index[0]}:
            self._same_model(place, states)
        return states

    def _normed(self, hidden: Tensor) -> Tensor:
        """Final states ``[rows, width]`` at the last token of what the last block gave."""
        final: Tensor = self._model.base_model.norm(hidden[:, -1:])[:, 0]
        return final

    def _same_model(self, place: int, states: Tensor) -> None:
        ids = torch.tensor([self._prompts[place]], device=self._model.device)
        expected = self._model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, -1]
        self.block_tokens += ids.numel() * self.shape.layers
        # Not a number is the business of another error.
        close = torch.isclose(states[place].to(expected), expected, rtol=1e-2, atol=1e-2, equal_nan=True)
        if not bool(close.all()):
            raise LocateError("the blocks one by one do not give what the model gives as a whole")

    @torch.inference_mode()
    def _step(
        self,
        layer: int,
        block_input: Tensor,
        bucket: Bucket,
        off: _Off,
        *,
        last_token: bool = False,
    ) -> tuple[Tensor, _Seen]:
        """Run one block with the group's heads ablated; also return what its heads gave."""
        found: list[_Seen] = []
        values: list[Tensor] = []
        attention, arguments = self._attention[layer], bucket.arguments[layer]
        members = off.members(layer)

        def keep_values(_module: Any, _inputs: Any, output: Tensor) -> None:
            # The last columns: all there are, or those after queries and keys where these are one layer.
            values.append(output[..., -self._kv_heads * self.shape.head_dim :])

        def keep_heads(_module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            outputs = _by_head(inputs[0], self.shape.heads)
            value = _by_head(values[0], self._kv_heads)
            self._first_token(layer, outputs, value)
            found.append(_Seen(block_input, outputs, value))
            if members:
                outputs = outputs.clone()
                outputs[:, :, members] = self._replaced(layer, found[0], bucket, off)[:, :, members]
            return (outputs.flatten(2), *inputs[1:])

        source = getattr(attention, "v_proj", None) or attention.qkv_proj
        handles = [
            source.register_forward_hook(keep_values),
            attention.o_proj.register_forward_pre_hook(keep_heads),
        ]
        try:
            return self._block(layer, block_input, arguments, last_token=last_token), found[0]
        finally:
            for handle in handles:
                handle.remove()

    def _replaced(self, layer: int, seen: _Seen, bucket: Bucket, off: _Off) -> Tensor:
        """What each head gives when it is ablated, in the shape of ``outputs``."""
        mask = bucket.arguments[layer].get("attention_mask")
        return replacements(off.kind, seen.outputs, seen.values, mask, epsilon=off.epsilon)

    @torch.inference_mode()
    def _variants(self, states: Tensor, layer: int, seen: _Seen, bucket: Bucket, off: _Off) -> None:
        """Fill ``states[h, prompt]`` for the prompts of a bucket and all heads of a layer."""
        last, members = self.shape.layers - 1, off.members(layer)
        replaced, base = self._replaced(layer, seen, bucket, off), seen.outputs
        if members:
            base = base.clone()
            base[:, :, members] = replaced[:, :, members]
        device, places = base.device, torch.tensor(bucket.index, device=states.device)
        pairs = torch.cartesian_prod(torch.arange(len(bucket.index)), torch.arange(self.shape.heads))
        for chunk in torch.split(pairs, max(1, self._batch_tokens // base.shape[1])):
            rows, heads = chunk.to(device).unbind(1)
            outputs = base[rows]
            outputs[torch.arange(len(rows), device=device), :, heads] = replaced[rows, :, heads]
            hidden = seen.block_input[rows.to(seen.block_input.device)]
            if layer == last:
                outputs, hidden = outputs[:, -1:], hidden[:, -1:]
            attention = self._attention[layer]
            with attention_gives(attention, attention.o_proj(outputs.flatten(2))):
                hidden = self._block(layer, hidden, bucket.arguments[layer])
            for later in range(layer + 1, last + 1):
                if off.members(later):
                    hidden, _ = self._step(later, hidden, bucket, off, last_token=later == last)
                else:
                    arguments = bucket.arguments[later]
                    hidden = self._block(later, hidden, arguments, last_token=later == last)
            final = self._normed(hidden).to(states.device)
            states[heads.to(states.device), places[rows.to(states.device)]] = final

    def _block(
        self, layer: int, hidden: Tensor, arguments: dict[str, Any], *, last_token: bool = False
    ) -> Tensor:
        self.block_tokens += hidden.shape[0] * hidden.shape[1]
        block, attention = self._blocks[layer], self._attention[layer]
        return run_block(block, attention, hidden, arguments, last_token=last_token)

    def _first_token(self, layer: int, outputs: Tensor, values: Tensor) -> None:
        """The first token sees itself alone: its heads must give its own values, or values are not these."""
        expected = values[:, 0].repeat_interleave(outputs.shape[2] // values.shape[2], dim=1)
        _finite(expected, f"at layer {layer}")
        if not torch.allclose(outputs[:, 0], expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max())):
            raise LocateError(
                f"layer {layer}: the first token's heads do not give its own values; this model's attention "
                "does something that ablation does not know"
            )


def _by_head(columns: Tensor, heads: int) -> Tensor:
    """``[…, heads * head_dim]`` as ``[…, heads, head_dim]``."""
    return columns.reshape(*columns.shape[:-1], heads, -1)


def _finite(states: Tensor, when: str) -> Tensor:
    if not bool(torch.isfinite(states).all()):
        raise LocateError(f"states are not finite {when}; try float32 or bfloat16 weights")
    return states
