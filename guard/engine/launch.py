"""Start a guarded vLLM API server: ``python -m guard.engine --model … --bundle … [vLLM's own flags]``.

The launcher checks everything that can be checked before weights are loaded, sets the extension points that
the guard needs, and hands over to vLLM's own server. Errors end in one sentence on stderr and exit status 2;
a failed self-test ends in exit status 3.
"""

from __future__ import annotations

import argparse
import gc
import os
import secrets
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from guard.bundle import Bundle, BundleError
from guard.engine import compat
from guard.engine.config import (
    AUDIENCE_ENV,
    KEY_FILE_ENV,
    MIDDLEWARE,
    SCHEDULER,
    SIGNED_ENV,
    WORKER,
    GuardConfig,
    keyring_from_env,
    trusted_keys,
    verify_adapters,
    verify_served_model,
)
from guard.engine.errors import GuardStartupError
from guard.engine.forking import keep_fork
from guard.engine.support import is_set
from guard.verdict import Decision, Rule

OTHER_SERVERS: tuple[tuple[str, Callable[[argparse.Namespace], bool]], ...] = (
    ("--headless", lambda args: bool(args.headless)),
    ("--grpc", lambda args: bool(getattr(args, "grpc", False))),
    ("--grpc-port", lambda args: getattr(args, "grpc_port", None) is not None),
    (
        # A directive is accepted once; each server would remember only those that it has seen itself.
        "--api-server-count above 1",
        lambda args: getattr(args, "api_server_count", None) not in (None, 1),
    ),
    (
        "--data-parallel-multi-port-external-lb",
        lambda args: bool(getattr(args, "data_parallel_multi_port_external_lb", False)),
    ),
    ("VLLM_USE_RUST_FRONTEND", lambda _: is_set("VLLM_USE_RUST_FRONTEND")),
)
"""Servers that vLLM can start in place of, or beside, the one that the guard's middleware runs in."""


def environment() -> None:
    """Settings that must be in place before vLLM is imported."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ[AUDIENCE_ENV] = os.environ.get(AUDIENCE_ENV) or f"engine-{secrets.token_hex(8)}"


def guard_arguments() -> argparse.ArgumentParser:
    """The guard's own flags."""
    parser = argparse.ArgumentParser(prog="python -m guard.engine", add_help=False)
    group = parser.add_argument_group("guard")
    group.add_argument("--bundle", required=True, help="directory of the bundle fitted on this model")
    group.add_argument("--key-file", help="keys shared with the gateway (kid:hex a line); none: no gateway")
    group.add_argument(
        "--guard-mode",
        choices=("enforce", "observe"),
        default="enforce",
        help="what happens to requests that carry no directive",
    )
    group.add_argument(
        "--guard-unscored-shape",
        choices=("refuse", "pass"),
        default="refuse",
        help="what becomes of their prompts that do not end as the chat template ends them",
    )
    group.add_argument("--guard-fpr", type=float, help="operating point for them, by false-positive rate")
    group.add_argument(
        "--require-signed-by",
        metavar="FILE",
        help=f"public keys (PEM) of which one must have signed the bundle; default: ${SIGNED_ENV}",
    )
    group.add_argument("--guard-donor", help="directory of the donor that the bundle's patches name")
    return parser


def guard_config(
    options: argparse.Namespace, bundle: Bundle, adapters: Mapping[str, str] | None = None
) -> GuardConfig:
    """The guard's configuration from its flags. Raises GuardStartupError."""
    card = bundle.card
    rate = card.default_false_positive_rate if options.guard_fpr is None else options.guard_fpr
    try:
        above = card.threshold(rate).probability
    except ValueError as error:
        raise GuardStartupError(f"--guard-fpr: {error}") from error
    default = Decision(
        policy="engine-default",
        mode=options.guard_mode,
        rules=(Rule(above=above, action="refuse"),),
        unscored_shape=options.guard_unscored_shape,
    )
    config = GuardConfig.for_bundle(
        options.bundle,
        bundle,
        default,
        adapters,
        options.guard_donor,
        trusted_keys(options.require_signed_by),
    )
    config.signed_by(bundle)
    return config


def engine_arguments(options: argparse.Namespace, rest: list[str]) -> argparse.Namespace:
    """vLLM's own arguments with the guard's extension points set. Raises GuardStartupError."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    server = compat.server_parts()
    parser = server.make_arg_parser(
        FlexibleArgumentParser(parents=[guard_arguments()], conflict_handler="resolve")
    )
    args = parser.parse_args(["--bundle", options.bundle, *rest])
    for flag, default in (("worker_cls", "auto"), ("scheduler_cls", None)):
        if getattr(args, flag) not in (default, None):
            raise GuardStartupError(f"--{flag.replace('_', '-')} is the guard's own; remove it")
    others = [name for name, asked_for in OTHER_SERVERS if asked_for(args)]
    if others:
        raise GuardStartupError(
            f"the guard answers from one API server of its own; leave out {', '.join(others)}"
        )
    try:
        bundle = Bundle.load(options.bundle)
    except BundleError as error:
        raise GuardStartupError(str(error)) from error
    args.model = args.model_tag or args.model if hasattr(args, "model_tag") else args.model
    if not Path(args.model).is_dir():
        raise GuardStartupError(
            f"--model {args.model}: expected a local directory, whose weights the guard can verify "
            "(download the checkpoint first, for example with: hf download)"
        )
    _verify(bundle, args)
    adapters = {module.name: module.path for module in args.lora_modules or ()}
    verify_adapters(bundle, adapters)
    args.worker_cls = WORKER
    args.scheduler_cls = SCHEDULER
    args.middleware = [*args.middleware, MIDDLEWARE]
    args.additional_config = {
        **(args.additional_config or {}),
        **guard_config(options, bundle, adapters).entry(),
    }
    server.validate_parsed_serve_args(args)
    return args


def _verify(bundle: Bundle, args: Any) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(args.model, local_files_only=True)
    verify_served_model(bundle, args.model, args.tokenizer or args.model, config)


def main(arguments: list[str] | None = None) -> int:
    """Run the server until it is told to stop; returns the exit status."""
    # Until the server handles it, the word that it will be stopped must not end it.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    options, rest = guard_arguments().parse_known_args(arguments)
    if options.key_file:
        os.environ[KEY_FILE_ENV] = options.key_file
    environment()
    try:
        keyring_from_env()
        compat.check()
        args = engine_arguments(options, rest)
    except GuardStartupError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return _serve(args)


def _serve(args: argparse.Namespace) -> int:
    import uvloop

    from guard.engine.frontend import SELF_TEST_FAILED

    server = compat.server_parts()
    server.cli_env_setup()
    server.configure_logging(args)
    keep_fork()
    # Modules stay: no collection of this process or of one forked from it need look at them again.
    gc.freeze()
    gc.enable()
    try:
        uvloop.run(server.run_server(args))
    except KeyboardInterrupt:
        return 0
    if SELF_TEST_FAILED.is_set():
        sys.stderr.write("error: the guard's self-test failed; see the log above\n")
        return 3
    return 0
