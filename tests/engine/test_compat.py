"""Which versions of vLLM are let through. The installed one is read; what is changed is its text."""

from __future__ import annotations

import ast
import sys
from types import SimpleNamespace

import pytest

from guard.engine import compat
from guard.engine.compat_names import ADAPTED, CALLABLES, MEMBERS
from guard.engine.errors import GuardStartupError
from guard.engine.signatures import installed

pytestmark = pytest.mark.filterwarnings("ignore")  # importing vLLM warns a lot

SCHEDULER = "vllm.v1.core.sched.scheduler"
KNOWN = sorted(compat.table())


@pytest.fixture
def version(monkeypatch):
    """Let the installed vLLM call itself otherwise."""
    import vllm

    return lambda text: monkeypatch.setattr(vllm, "__version__", text)


def edited(module, old, new):
    """The installed sources with one piece of text replaced."""
    real = installed("vllm")

    def sources(name):
        text = real(name)
        if name != module or text is None:
            return text
        assert old in text
        return text.replace(old, new)

    return sources


def refused(sources=None):
    with pytest.raises(GuardStartupError) as caught:
        compat.check(sources)
    return str(caught.value)


def test_installed_version_is_one_that_was_run_and_is_laid_out_as_recorded():
    import vllm

    assert compat.check() == vllm.__version__
    assert vllm.__version__.startswith(tuple(f"{minor}." for minor in compat.RUN))


def test_unknown_version_is_refused_by_name_of_those_that_were_run_and_of_the_override(version):
    version("0.99.1")
    told = refused()
    assert "0.30.x, 0.31.x, 0.32.x only" in told
    assert "NEURONGUARD_UNTESTED_VLLM=0.99.1" in told


@pytest.mark.parametrize("near", ["0.3", "0.320.1", "0.29.9", "1.32.0", "dev"])
def test_version_whose_name_only_resembles_a_known_one_is_refused(version, near):
    version(near)
    assert f"vLLM {near} is installed" in refused()


def test_version_that_was_only_compared_is_refused_and_told_apart(version):
    version("0.33.0")
    told = refused()
    assert "the sources of 0.33 were compared, it was not run" in told
    assert "NEURONGUARD_UNTESTED_VLLM=0.33.0" in told


def test_overridden_unknown_version_passes_when_it_is_laid_out_as_a_known_one(version, monkeypatch):
    version("0.99.1")
    monkeypatch.setenv(compat.OVERRIDE_ENV, "0.99.1")
    assert compat.check() == "0.99.1"


def test_override_is_for_one_version(version, monkeypatch):
    version("0.99.2")
    monkeypatch.setenv(compat.OVERRIDE_ENV, "0.99.1")
    assert "NEURONGUARD_UNTESTED_VLLM=0.99.2" in refused()


CHANGES = {
    "parameter": (
        (SCHEDULER, "def add_request(self, request:", "def add_request(self, new, request:"),
        f"{SCHEDULER}:Scheduler.add_request: found (self, new, request), expected (self, request)",
    ),
    "method": (
        (SCHEDULER, "def update_from_output(", "def process_output("),
        f"{SCHEDULER}:Scheduler.update_from_output: found nothing, expected (self, scheduler_output",
    ),
    "inherited method": (
        (
            "vllm.v1.core.sched.async_scheduler",
            "    def __init__(self, ",
            "    def update_from_output(self, ",
        ),
        "AsyncScheduler.update_from_output: found (self, *args, **kwargs), expected (self, scheduler_output",
    ),
    "field": (
        ("vllm.v1.outputs", "    sampled_token_ids: list", "    token_ids: list"),
        "vllm.v1.outputs:ModelRunnerOutput: found req_id_to_index, prompt_logprobs_dict",
    ),
    "attribute": (
        ("vllm.v1.request", "self.num_prompt_tokens = ", "self.prompt_length = "),
        "vllm.v1.request:Request: found",
    ),
}


@pytest.mark.parametrize(("change", "sentence"), CHANGES.values(), ids=CHANGES)
def test_known_version_that_is_laid_out_otherwise_is_refused_naming_the_difference(change, sentence):
    assert sentence in refused(edited(*change))


def test_known_version_that_is_laid_out_otherwise_cannot_be_overridden(version, monkeypatch):
    import vllm

    monkeypatch.setenv(compat.OVERRIDE_ENV, vllm.__version__)
    change, sentence = CHANGES["parameter"]
    assert sentence in refused(edited(*change))


@pytest.mark.parametrize(("change", "sentence"), CHANGES.values(), ids=CHANGES)
def test_override_does_not_help_a_version_that_is_like_none_it_knows(version, monkeypatch, change, sentence):
    version("0.99.1")
    monkeypatch.setenv(compat.OVERRIDE_ENV, "0.99.1")
    told = refused(edited(*change))
    assert "as in none of the versions it knows" in told
    assert sentence in told


def test_missing_vllm_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert "install neuronguard[cpu] or neuronguard[cuda]" in refused()


def test_name_that_was_not_read_out_of_all_versions_is_refused(monkeypatch):
    monkeypatch.setitem(CALLABLES, f"{SCHEDULER}:Scheduler.shutdown", ())
    told = refused(installed("vllm"))
    assert "Scheduler.shutdown is not in the table (run: make compat ARGS=--signatures)" in told


def test_installed_sources_are_read_once_and_compared_each_time(version, monkeypatch):
    reads = []
    monkeypatch.setattr(compat, "installed", lambda package: reads.append(package) or installed(package))
    compat.read_installed.cache_clear()
    compat.check()
    compat.check()
    assert reads == ["vllm"]
    version("0.99.1")
    assert "was run on" in refused()


def test_versions_that_were_run_and_compared_are_those_in_the_table():
    assert sorted([*compat.RUN, *compat.COMPARED]) == KNOWN
    assert [row["read_from"].partition(" ")[2].rpartition(".")[0] for row in compat.table().values()] == KNOWN


@pytest.mark.parametrize("minor", KNOWN)
def test_table_holds_every_name_and_no_other(minor):
    row = compat.table()[minor]
    assert row["callables"].keys() == CALLABLES.keys()
    assert row["members"].keys() == MEMBERS.keys()


@pytest.mark.parametrize("minor", KNOWN)
def test_every_parameter_that_the_guard_uses_is_there(minor):
    for name, signature in compat.table()[minor]["callables"].items():
        if signature is not None:
            arguments = ast.parse(f"def f{signature}: ...").body[0].args
            parameters = {a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
            assert set(CALLABLES[name]) <= parameters, name


def test_what_differs_between_versions_is_what_the_guard_adapts_to():
    rows = compat.table().values()
    differing = {
        name
        for kind, names in (("callables", CALLABLES), ("members", MEMBERS))
        for name in names
        if any(row[kind][name] != next(iter(rows))[kind][name] for row in rows)
    }
    assert differing == ADAPTED.keys()


def test_nothing_but_what_is_adapted_is_missing_anywhere():
    for minor, row in compat.table().items():
        missing = {name for name, signature in row["callables"].items() if signature is None}
        missing |= {name for name, found in row["members"].items() if found != list(MEMBERS[name])}
        assert missing <= ADAPTED.keys(), minor


class TestAdaptation:
    @pytest.mark.parametrize("minor", KNOWN)
    def test_every_version_has_each_part_of_the_server_in_one_of_its_places(self, minor):
        callables = compat.table()[minor]["callables"]
        for part, places in compat.SERVER.items():
            found = [name for name in places if callables[name] is not None]
            assert len(found) == 1 or (minor, part) == ("0.30", "configure_logging"), part

    def test_parts_of_the_installed_server_are_found(self):
        import vllm

        parts = compat.server_parts()
        assert parts.run_server.__name__ == "run_server"
        assert parts.make_arg_parser.__name__ == "make_arg_parser"
        wanted = "_nothing" if vllm.__version__.startswith("0.30.") else "configure_logging_from_args"
        assert parts.configure_logging.__name__ == wanted

    def test_missing_part_names_the_places_that_were_tried(self, monkeypatch):
        monkeypatch.setitem(compat.SERVER, "run_server", ("vllm.nowhere:run_server", "vllm:run_server"))
        with pytest.raises(ImportError, match=r"none of vllm\.nowhere:run_server, vllm:run_server"):
            compat.server_parts()

    def test_prompt_logprobs_are_dropped_in_every_form_there_is(self):
        of_030 = SimpleNamespace(prompt_logprobs_dict={"a": 1, "b": 2})
        compat.drop_prompt_logprobs(of_030, "a")
        assert of_030.prompt_logprobs_dict == {"b": 2}
        of_031 = SimpleNamespace(
            prompt_logprobs_dict={"a": 1}, prompt_token_id_logprobs_dict={"a": 1, "b": 2}
        )
        compat.drop_prompt_logprobs(of_031, "a")
        assert (of_031.prompt_logprobs_dict, of_031.prompt_token_id_logprobs_dict) == ({}, {"b": 2})
        compat.drop_prompt_logprobs(of_031, "a")
