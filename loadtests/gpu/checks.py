"""All checks, the most telling first: what each is called, what it calls, and how long it may take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from loadtests.gpu.modes import MODES


class Check(NamedTuple):
    """One line of the report."""

    name: str
    title: str
    call: str
    """``module:function``, called with a Recorder and the options."""
    options: dict[str, Any]
    seconds: int
    """Time limit."""
    on_cpu: bool = False
    """Whether it can be done without a GPU."""
    needs_vllm: bool = False


def all_checks() -> list[Check]:
    """In the order in which they are run."""
    return [*OPERATION, *TAPS, *TRANSFORMERS, COMPAT, *engine_checks(), *ARTIFACTS, *OVERHEAD, TESTS]


def select(names: Sequence[str]) -> list[Check]:
    """The checks with these names, or under them: ``op`` selects ``op/graph``. All when none is named.

    Raises ValueError for a name that selects nothing.
    """
    checks = all_checks()
    for name in names:
        if not any(_is_under(check.name, name) for check in checks):
            groups = sorted({check.name.partition("/")[0] for check in checks})
            raise ValueError(f"no check is called {name!r}; --list shows all, groups are {', '.join(groups)}")
    return [check for check in checks if not names or any(_is_under(check.name, name) for name in names)]


def _is_under(check: str, name: str) -> bool:
    return check == name or check.startswith(name.rstrip("/") + "/")


def engine_checks() -> list[Check]:
    """The matrix of modes, runners, schedulers, dtypes and models."""
    wanted = [
        # vLLM's defaults on a GPU, then what is furthest from them.
        ("tiny", "bfloat16", "full_and_piecewise", "v2", "async"),
        ("tiny", "float32", "full_and_piecewise", "v2", "async"),
        ("tiny", "float32", "eager", "v1", "sync"),
        ("tiny", "float32", "compiled", "v1", "sync"),
    ]
    wanted += [
        ("tiny", "float32", mode, runner, scheduling)
        for mode in MODES
        for runner in ("v1", "v2")
        for scheduling in ("sync", "async")
    ]
    wanted += [("tiny", "bfloat16", mode, runner, "async") for mode in MODES for runner in ("v1", "v2")]
    wanted += [
        ("large", dtype, mode, runner, "async")
        for dtype in ("float32", "bfloat16")
        for mode in ("eager", "full_and_piecewise")
        for runner in ("v1", "v2")
    ]
    return [_engine_check(*each) for each in dict.fromkeys(wanted)]


def _engine_check(model: str, dtype: str, mode: str, runner: str, scheduling: str) -> Check:
    return Check(
        f"engine/{model}/{dtype}/{mode}/{runner}/{scheduling}",
        "Scores, verdicts and tokens of the guarded engine against transformers and plain vLLM",
        "loadtests.gpu.engine:check",
        {"model": model, "dtype": dtype, "mode": mode, "runner": runner, "scheduling": scheduling},
        600,
        on_cpu=(mode, runner, scheduling) in (("eager", "v1", "sync"), ("compiled", "v1", "sync")),
        needs_vllm=True,
    )


OPERATION = [
    Check("op/indexing", "The gather operation equals indexing",
          "loadtests.gpu.operation:indexing", {}, 180, on_cpu=True),
    Check("op/graph", "The operation in a CUDA graph, over 100 replays",
          "loadtests.gpu.operation:graph", {}, 180),
    Check("op/weigh", "The operation of a sequence probe's taps equals a product",
          "loadtests.gpu.weighing:products", {}, 180, on_cpu=True),
    Check("op/weigh-graph", "The same in a CUDA graph, over 100 replays",
          "loadtests.gpu.weighing:graph", {}, 180),
    Check("op/compile", "The operation under torch.compile, without a copy of the features",
          "loadtests.gpu.compiled:default", {}, 300, on_cpu=True),
    Check("op/reduce-overhead", "The same with torch.compile's own CUDA graphs",
          "loadtests.gpu.compiled:reduce_overhead", {}, 300),
    Check("op/time", "Time of all gathers of a step, beside the down projections of a 7B-like model",
          "loadtests.gpu.timing:table", {}, 300, on_cpu=True),
]  # fmt: skip
TAPS = [
    Check("taps/parity", "Taps in replayed graphs give the scores of the plain model, dummy replays between",
          "loadtests.gpu.taps:parity", {}, 180, on_cpu=True),
    Check("taps/in-flight", "Steps that are queued keep their own rows and scores",
          "loadtests.gpu.taps:in_flight", {}, 180, on_cpu=True),
    Check("taps/synchronisation", "Staging and scoring never wait for the GPU",
          "loadtests.gpu.taps:synchronisation", {}, 180),
]  # fmt: skip
TRANSFORMERS = [
    Check(f"transformers/{model}", "Scores read by guard.capture, on the device against the CPU",
          "loadtests.gpu.offline:compare", {"model": model}, 600, on_cpu=True)
    for model in ("tiny", "large")
]  # fmt: skip
COMPAT = Check(
    "compat", "What the guard says of the installed vLLM",
    "loadtests.gpu.machine:compatibility", {}, 180, on_cpu=True, needs_vllm=True,
)  # fmt: skip
ARTIFACTS = [
    Check("artifacts/twice", "A second start reuses the first one's compiled model and scores right",
          "loadtests.gpu.artifacts:twice", {}, 1200, on_cpu=True, needs_vllm=True),
    Check("artifacts/plain-first", "A guarded start reuses nothing that plain vLLM has compiled",
          "loadtests.gpu.artifacts:plain_first", {}, 900, on_cpu=True, needs_vllm=True),
]  # fmt: skip
OVERHEAD = [
    Check(f"overhead/{units}", f"Cost of reading {units} neurons, in pairs with plain vLLM",
          "loadtests.gpu.overhead:measure", {"units": units}, 1200, needs_vllm=True)
    for units in (100, 1000, 5000)
]  # fmt: skip
TESTS = Check(
    "tests", "The repository's tests of the engine half",
    "loadtests.gpu.suite:run", {}, 900, on_cpu=True, needs_vllm=True,
)  # fmt: skip
