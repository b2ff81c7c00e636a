"""The one place that knows vLLM's versions: which ones were run, what each looks like, and where they differ.

vLLM promises nothing about what the guard relies on. A version that was not run is refused, and so is a known
version that is not laid out as recorded: better no engine than one whose guard reads something else.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple

from guard.engine.compat_names import CALLABLES, MEMBERS
from guard.engine.errors import GuardStartupError
from guard.engine.signatures import Reader, Sources, installed

RUN = ("0.30", "0.31", "0.32")
"""Minor versions on which the engine's tests were run (`docs/results/compat.md`)."""
COMPARED = ("0.33",)
"""Minor versions of which only the sources were compared."""
OVERRIDE_ENV = "NEURONGUARD_UNTESTED_VLLM"
TABLE = Path(__file__).with_name("compat_table.json")

Row = Mapping[str, Any]
"""``{"callables": {name: signature or None}, "members": {class: [names present] or None}}``."""


def check(sources: Sources | None = None) -> str:
    """Check the installed vLLM and return its version. Raises GuardStartupError.

    ``sources`` are those of the installed package if None; nothing of it but ``vllm`` itself is imported.
    """
    try:
        import vllm
    except ImportError as error:
        raise GuardStartupError(
            f"vLLM is not installed ({error}); install neuronguard[cpu] or neuronguard[cuda]"
        ) from error
    version = str(vllm.__version__)
    minor = ".".join(version.split(".")[:2])
    _check_version(version, minor)
    found = read(sources) if sources else read_installed()
    if minor in table():
        if wrong := differences(table()[minor], found):
            raise GuardStartupError(
                f"vLLM {version} is not laid out as the guard expects of {minor}: {'; '.join(wrong)}; "
                "reinstall it from its package, or install another version that was run"
            )
    elif all(differences(row, found) for row in table().values()):
        newest = list(table())[-1]
        raise GuardStartupError(
            f"vLLM {version} was allowed by {OVERRIDE_ENV}, but what the guard relies on is as in none of "
            f"the versions it knows; it differs from {newest} in: "
            f"{'; '.join(differences(table()[newest], found))}"
        )
    return version


def _check_version(version: str, minor: str) -> None:
    if minor in RUN or os.environ.get(OVERRIDE_ENV) == version:
        return
    run = ", ".join(f"{minor}.x" for minor in RUN)
    compared = f" (the sources of {minor} were compared, it was not run)" if minor in COMPARED else ""
    raise GuardStartupError(
        f"vLLM {version} is installed, but this version of the guard was run on {run} only{compared}; "
        f"install one of those, or set {OVERRIDE_ENV}={version} to try at your own risk"
    )


@cache
def read_installed() -> Row:
    """What ``read`` finds in the installed vLLM; a forked process knows it from the one it is a copy of."""
    return read(installed("vllm"))


@cache
def table() -> Mapping[str, Row]:
    """What each known minor version looks like, oldest first."""
    rows: dict[str, Row] = json.loads(TABLE.read_text("utf-8"))
    return rows


def read(sources: Sources) -> Row:
    """Everything the guard relies on, as it is in these sources."""
    reader = Reader(sources)
    members = {name: reader.members(name) for name in MEMBERS}
    return {
        "callables": {name: reader.signature(name) for name in CALLABLES},
        "members": {
            name: None if (there := members[name]) is None else [one for one in wanted if one in there]
            for name, wanted in MEMBERS.items()
        },
    }


def differences(expected: Row, found: Row) -> list[str]:
    """What is not as expected, a phrase each."""
    wrong = []
    for kind in ("callables", "members"):
        for name, here in found[kind].items():
            if name not in expected[kind]:
                wrong.append(f"{name} is not in the table (run: make compat ARGS=--signatures)")
            elif here != (there := expected[kind][name]):
                wrong.append(f"{name}: found {_phrase(here)}, expected {_phrase(there)}")
    return wrong


def _phrase(value: str | list[str] | None) -> str:
    if not value:
        return "nothing"
    return value if isinstance(value, str) else ", ".join(value)


class ServerParts(NamedTuple):
    """vLLM's API server in pieces."""

    make_arg_parser: Callable[..., Any]
    validate_parsed_serve_args: Callable[..., Any]
    cli_env_setup: Callable[[], None]
    configure_logging: Callable[..., Any]
    """Takes the parsed arguments; does nothing in 0.30, which reads the environment only."""
    run_server: Callable[..., Any]


SERVER: Final[dict[str, tuple[str, ...]]] = {
    "make_arg_parser": (
        "vllm.entrypoints.launchers.cli_args:make_arg_parser",
        "vllm.entrypoints.common.cli_args:make_arg_parser",
    ),
    "validate_parsed_serve_args": (
        "vllm.entrypoints.launchers.cli_args:validate_parsed_serve_args",
        "vllm.entrypoints.common.cli_args:validate_parsed_serve_args",
    ),
    "cli_env_setup": (
        "vllm.entrypoints.serve.utils.api_utils:cli_env_setup",
        "vllm.entrypoints.common.startup:cli_env_setup",
    ),
    "configure_logging": ("vllm.logger:configure_logging_from_args",),
    "run_server": ("vllm.entrypoints.launchers.api_server.entry:run_server",),
}
"""Where the parts are: until 0.32, and from 0.33 on where they moved."""


def server_parts() -> ServerParts:
    """vLLM's API server, wherever this version keeps it. Raises ImportError."""
    absent = {"configure_logging": _nothing}
    return ServerParts(**{part: _first(places, absent.get(part)) for part, places in SERVER.items()})


def drop_prompt_logprobs(model_runner_output: Any, request_id: str) -> None:
    """Take a request's prompt logprobs out of a step's output, in every form this version has."""
    model_runner_output.prompt_logprobs_dict.pop(request_id, None)
    getattr(model_runner_output, "prompt_token_id_logprobs_dict", {}).pop(request_id, None)  # from 0.31


def _nothing(_: Any) -> None:
    """Stands in for a step that this version of vLLM does not have."""


def _first(places: tuple[str, ...], otherwise: Callable[..., Any] | None) -> Callable[..., Any]:
    for place in places:
        module, _, attribute = place.partition(":")
        try:
            found: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
        except (ModuleNotFoundError, AttributeError):
            continue
        return found
    if otherwise is None:
        raise ImportError(f"this vLLM has none of {', '.join(places)}")
    return otherwise
