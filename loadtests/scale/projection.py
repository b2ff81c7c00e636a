"""What the formulas say of larger models on GPUs. A projection: nothing here was run on such a machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from loadtests.scale.formulas import Rank, step


@dataclass(frozen=True)
class Device:
    """An H100 SXM. Source of the first three: NVIDIA's H100 data sheet."""

    bandwidth: float = 3.35e12
    """Bytes a second of its memory."""
    flops: float = 989e12
    """A second, bfloat16, dense."""
    link: float = 450e9
    """Bytes a second to another GPU over NVLink, one way."""
    recorded: float = 2e-6
    """Seconds of a small kernel in a CUDA graph: assumed, above the 0.5 µs of overhead and the one to two of
    running that NVIDIA reports ("Getting Started with CUDA Graphs")."""
    launched: float = 4e-6
    """Seconds of a launch without a graph: assumed, above the 3.8 µs of the same source."""
    reduction: float = 10e-6
    """Seconds of a small all-reduce beside its bytes: assumed."""


H100 = Device()


@dataclass(frozen=True)
class Served:
    """A model as its configuration file has it, in bfloat16, on ``gpus`` tensor-parallel GPUs."""

    name: str
    parameters: float
    layers: int
    kv_heads: int
    gpus: int
    head_dim: int = 128

    @property
    def cache_bytes(self) -> int:
        """Of one token, over all GPUs."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim


SERVED = (
    Served("8B", 8.03e9, layers=32, kv_heads=8, gpus=1),
    Served("70B", 70.6e9, layers=80, kv_heads=8, gpus=4),
    Served("70B", 70.6e9, layers=80, kv_heads=8, gpus=8),
)
"""Llama 3.1's sizes."""
REQUESTS = 256
"""``--max-num-seqs``."""
BATCH, CONTEXT = 64, 2048
"""Requests that decode, and tokens that each has behind it."""
CHUNK, ENDING = 2048, 8
"""Tokens of a prefill step, and prompts that end in it."""


class Cost(NamedTuple):
    """Seconds of a step on one GPU, and what the guard adds to it."""

    plain: float
    guard: float

    @property
    def share(self) -> float:
        """Guard over plain."""
        return self.guard / self.plain


def rank_of(served: Served, units: int, places: int) -> Rank:
    """A linear probe on ``units`` neurons, as many on each GPU, in ``places`` layers."""
    return Rank(features=round(units / served.gpus), places=places, requests=REQUESTS, element=2)


def decode(served: Served, rank: Rank, device: Device = H100) -> Cost:
    """A recorded decode step: reads all weights and the cache once. No prompt ends; the taps run anyway."""
    moved = 2 * served.parameters + BATCH * CONTEXT * served.cache_bytes
    plain = moved / served.gpus / device.bandwidth
    return Cost(plain, seconds(rank, served, 0, BATCH, device))


def prefill(served: Served, rank: Rank, device: Device = H100) -> Cost:
    """A recorded step of ``CHUNK`` prompt tokens in which ``ENDING`` prompts end."""
    plain = 2 * served.parameters * CHUNK / served.gpus / device.flops
    return Cost(plain, seconds(rank, served, ENDING, CHUNK, device))


def seconds(rank: Rank, served: Served, ending: int, tokens: int, device: Device = H100) -> float:
    """Time of the guard's part of a recorded step, one operation after the other.

    What runs outside the recorded graph (staging, probe, copies) is launched, not replayed.
    """
    work = step(rank, ending, tokens, replayed=True, ranks=served.gpus)
    read = rank.places if tokens else 0
    time = read * device.recorded + (work.operations - read) * device.launched + work.moved / device.bandwidth
    if work.reduced:
        # Each GPU sends what it has to the others and receives what they have, at most once around.
        time += device.reduction + 2 * work.reduced / device.link
    return time
