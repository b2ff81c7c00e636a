"""Run one decoder block of a transformers model by itself, whole or around an attention that is known."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from guard.locate.errors import LocateError


def run_block(
    block: Any, attention: Any, hidden: Tensor, arguments: dict[str, Any], *, last_token: bool = False
) -> Tensor:
    """What ``block`` makes of ``hidden`` ``[rows, tokens, width]`` and its other arguments.

    ``attention`` is the block's. With ``last_token``, what follows attention runs for the last token alone,
    and the result is ``[rows, 1, width]``. Raises LocateError when the block does not call its attention.
    """
    if last_token:
        output = _attention_output(block, attention, hidden, arguments)
        with attention_gives(attention, output):
            return run_block(block, attention, hidden[:, -1:], arguments)
    found = block(hidden, **arguments)
    result: Tensor = found[0] if isinstance(found, tuple) else found
    return result


class _AttentionDone(Exception):  # noqa: N818 (no error: it ends a block early)
    def __init__(self, output: Tensor) -> None:
        self.output = output


def _stop(_module: Any, _inputs: Any, output: Any) -> None:
    raise _AttentionDone(output[0])


def _last_token(_module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0][:, -1:], *inputs[1:])


def _attention_output(block: Any, attention: Any, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
    """What ``attention`` returns for the last token when ``block`` runs; the rest of the block does not."""
    handles = [
        attention.register_forward_hook(_stop),
        attention.o_proj.register_forward_pre_hook(_last_token),
    ]
    try:
        block(hidden, **arguments)
    except _AttentionDone as done:
        return done.output
    finally:
        for handle in handles:
            handle.remove()
    raise LocateError("a decoder block does not call its attention")


@contextmanager
def attention_gives(attention: Any, output: Tensor) -> Iterator[None]:
    """Inside the block, all that ``attention`` does is to return ``output``."""
    with _forward(attention, lambda *_args, **_kwargs: (output, None)):
        yield


@contextmanager
def idle(block: Any) -> Iterator[None]:
    """Inside the context, the block returns the hidden states that it is given."""
    with _forward(block, lambda hidden, *_args, **_kwargs: hidden):
        yield


@contextmanager
def _forward(module: Any, forward: Any) -> Iterator[None]:
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
