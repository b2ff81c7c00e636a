"""Compiled models on disk: the guard's own are found again, plain vLLM's are never taken for them.

vLLM keeps each compiled model in a folder whose name hashes everything that it depends on. Whether a start
loads one is seen in vLLM's counters. On a CPU it loads none, its own neither: there only the folders tell.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from loadtests.gpu import engine, modes
from loadtests.gpu.recorder import Recorder
from loadtests.gpu.world import World, prepare

LOADED = ("num_aot_artifacts_loaded", "num_compiled_artifacts_loaded")
"""Counters of vllm/compilation/counter.py."""


class Starts:
    """Engines that are started one after the other with one cache."""

    def __init__(self, recorder: Recorder, cache: Path) -> None:
        self.recorder = recorder
        self.made: World = prepare(recorder.folder, "tiny", recorder.device)
        mode = "piecewise" if recorder.on_cuda else "compiled"
        self._options = modes.options(mode, "sync", "float32", recorder.device)
        self._cache = cache

    def plain(self) -> dict[str, Any]:
        """What plain vLLM answers. Gives the check up when it does not run."""
        settings = modes.environment("v1", str(self._cache))
        answers, why = engine.serve(self.recorder, self.made, None, self._options, settings)
        if why:
            self.recorder.cannot(f"plain vLLM does not run in this mode: {why}")
        return answers

    def guarded(self, plain: dict[str, Any]) -> dict[str, Any]:
        """What the guarded engine answers, once judged."""
        settings = modes.environment("v1", str(self._cache))
        answers, why = engine.serve(self.recorder, self.made, self.made.bundle, self._options, settings)
        engine.verdict(self.recorder, self.made, "float32", plain, answers, why)
        return answers

    def folders(self) -> set[str]:
        """Folders of compiled models in the cache."""
        return {str(found.parent.relative_to(self._cache)) for found in self._cache.rglob("rank_0_0")}


def twice(recorder: Recorder) -> None:
    """The guarded engine is started twice with one cache; plain vLLM with another, to compare."""
    with tempfile.TemporaryDirectory() as theirs, tempfile.TemporaryDirectory() as ours:
        plain, guarded = Starts(recorder, Path(theirs)), Starts(recorder, Path(ours))
        tokens = plain.plain()
        baseline = loaded(plain.plain())
        guarded.guarded(tokens)
        before = guarded.folders()
        found = loaded(guarded.guarded(tokens))
        new = guarded.folders() - before
    recorder.number("compiled models that plain vLLM loads at its second start", baseline)
    recorder.number("compiled models that the guarded engine loads at its second start", found)
    recorder.expect(bool(before), "the first start left no compiled model")
    recorder.expect(not new, f"the second start did not look for the first one's models: {sorted(new)}")
    if baseline == 0:
        recorder.cannot("plain vLLM itself loads no compiled model at its second start")
    recorder.expect(found > 0, "the second start loaded no compiled model, while plain vLLM's does")


def plain_first(recorder: Recorder) -> None:
    """Plain vLLM fills the cache, then the guarded engine starts with it."""
    with tempfile.TemporaryDirectory() as cache:
        starts = Starts(recorder, Path(cache))
        tokens = starts.plain()
        before = starts.folders()
        found = loaded(starts.guarded(tokens))
        new = starts.folders() - before
    recorder.number("compiled models in the cache, plain", len(before))
    recorder.number("compiled models in the cache, added by the guarded start", len(new))
    recorder.expect(bool(before), "plain vLLM left no compiled model")
    recorder.expect(bool(new), "the guarded start added no compiled model: it has the name of plain vLLM's")
    recorder.expect(found == 0, f"the guarded start loaded {found} models, which can only be plain vLLM's")


def loaded(answers: dict[str, Any]) -> int:
    """Compiled models that a start found in the cache; -1 when it ended before that is known."""
    if "facts" not in answers:
        return -1
    return sum(int(answers["facts"]["counters"].get(name, 0)) for name in LOADED)
