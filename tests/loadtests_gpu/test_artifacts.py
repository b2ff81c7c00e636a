"""Judging the reuse of compiled models; engines are replaced where ``engine.serve`` starts them."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadtests.gpu import artifacts, engine
from loadtests.gpu.recorder import CannotError, Recorder, read


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a check with engines that name their compiled models by ``name(guarded, turn)``."""

    def run(check, name, loads=True):
        turns = []

        def serve(recorder, made, bundle, options, settings):
            turns.append(bundle)
            folder = (
                Path(settings["VLLM_CACHE_ROOT"]) / "aot" / name(bundle is not None, len(turns)) / "rank_0_0"
            )
            found = int(folder.exists() and loads)
            folder.mkdir(parents=True, exist_ok=True)
            return {"facts": {"counters": {"num_aot_artifacts_loaded": found}}}, None

        class Made:
            bundle = "bundle"

        monkeypatch.setattr(engine, "serve", serve)
        monkeypatch.setattr(engine, "verdict", lambda *_: None)
        monkeypatch.setattr(artifacts, "prepare", lambda *_: Made)
        check(Recorder(tmp_path / "record", device="cpu", folder=tmp_path))
        return [entry["failure"] for entry in read(tmp_path / "record") if "failure" in entry]

    return run


def by_kind(guarded, turn):
    return "guarded" if guarded else "plain"


def test_own_models_reused_and_no_others_is_right(run):
    assert run(artifacts.twice, by_kind) == []
    assert run(artifacts.plain_first, by_kind) == []


def test_a_name_that_changes_from_start_to_start_is_a_fault(run):
    failures = run(artifacts.twice, lambda guarded, turn: f"guarded-{turn}" if guarded else "plain")
    assert any("did not look for" in failure for failure in failures)
    assert any("loaded no compiled model, while plain vLLM's does" in failure for failure in failures)


def test_one_name_for_plain_and_guarded_is_a_fault(run):
    failures = run(artifacts.plain_first, lambda guarded, turn: "same")
    assert any("it has the name of plain vLLM's" in failure for failure in failures)
    assert any("loaded 1 models" in failure for failure in failures)


def test_where_plain_vllm_loads_nothing_reuse_cannot_be_checked(run):
    with pytest.raises(CannotError, match="plain vLLM itself loads no compiled model"):
        run(artifacts.twice, by_kind, loads=False)
