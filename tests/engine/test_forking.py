"""When vLLM's processes are copies of the API server, and what that server leaves them."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from guard.engine import compat, launch
from guard.engine.forking import BIND_ENV, METHOD_ENV, keep_fork, may_fork
from guard.serve.plan import engine_environment

pytestmark = pytest.mark.filterwarnings("ignore")  # importing vLLM warns a lot


@pytest.fixture
def start_method(monkeypatch):
    """The start method that vLLM reads from an environment, once its CPU platform has set its own."""
    from vllm import envs

    def read(**environment):
        monkeypatch.setattr(envs, "environment_variables", dict(envs.environment_variables))
        for name in (METHOD_ENV, BIND_ENV):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        kept = keep_fork()
        os.environ[METHOD_ENV] = "spawn"  # vllm/platforms/cpu.py: check_and_update_config
        return kept, envs.VLLM_WORKER_MULTIPROC_METHOD

    return read


def test_fork_is_kept_where_it_was_asked_for_and_no_thread_is_tied(start_method):
    assert start_method(**{METHOD_ENV: "fork", BIND_ENV: "nobind"}) == (True, "fork")


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {BIND_ENV: "nobind"},
        {METHOD_ENV: "spawn", BIND_ENV: "nobind"},
        {METHOD_ENV: "fork"},
        {METHOD_ENV: "fork", BIND_ENV: "auto"},
        {METHOD_ENV: "fork", BIND_ENV: "0|1"},
    ],
    ids=lambda environment: " ".join(environment.values()) or "unset",
)
def test_vllm_spawns_as_ever_otherwise(start_method, environment):
    assert start_method(**environment) == (False, "spawn")


def test_vllm_takes_its_start_method_from_the_table_that_is_changed(start_method):
    from vllm.utils.system_utils import get_mp_context

    start_method(**{METHOD_ENV: "fork", BIND_ENV: "nobind"})
    assert get_mp_context().get_start_method() == "fork"


def test_the_embedded_default_forks_unless_the_user_says_otherwise():
    assert may_fork(engine_environment({}))
    assert not may_fork(engine_environment({METHOD_ENV: "spawn"}))
    assert not may_fork(engine_environment({BIND_ENV: "0-3"}))


def test_nothing_is_collected_while_the_launcher_is_imported():
    code = (
        "import gc, runpy, sys, types\n"
        "launch = sys.modules['guard.engine.launch'] = types.ModuleType('launch')\n"
        "launch.main = lambda: int(gc.isenabled())\n"
        "runpy.run_module('guard.engine', run_name='__main__')\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_server_collects_again_but_not_what_was_imported(monkeypatch):
    seen = []

    async def run_server(args):
        seen.append((gc.isenabled(), gc.get_freeze_count() > 10_000))

    parts = SimpleNamespace(
        cli_env_setup=lambda: None, configure_logging=lambda args: None, run_server=run_server
    )
    monkeypatch.setattr(compat, "server_parts", lambda: parts)
    gc.disable()
    try:
        assert launch._serve(SimpleNamespace()) == 0
    finally:
        gc.unfreeze()
        gc.enable()
    assert seen == [(True, True)]
