"""A spot check in vLLM: patched answers of the engine beside those of the reference, on the same prompts.

One guarded engine in this process, float32, holds the pair's best dynamic patch and its best stored one. Each
request says by its directive under which it runs; many run at once.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from guard import patch as patches
from guard.bundle import Bundle, Site
from guard.locate.patching import units_of
from guard.patch import Patch
from guard.patch_card import PatchSite
from guard.prompts import Tokens
from guard.sealed import Keyring
from guard.verdict import Decision, Directive, Rule
from loadtests.batches import with_threshold
from loadtests.random_model import make_bundle
from models.recipe.patching.measures import rate
from models.recipe.patching.study import Lab
from models.recipe.patching.ways import Way, chosen, said, stored

PROMPTS = 120
AUDIENCE = "spot-check"
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}


def checked(lab: Lab, ways: dict[str, Way]) -> dict[str, Any]:
    """By way (``dynamic``, ``stored``, and ``none`` for the unpatched recipient): how far both agree."""

    def run() -> dict[str, Any]:
        print("engine:", lab.pair.name, flush=True)
        prompts = lab.prompts("harmful")[:PROMPTS]
        with tempfile.TemporaryDirectory() as folder:
            found = _answers(lab, ways, prompts, Path(folder))
        return {
            name: _compared(lab, prompts, each, _reference(lab, ways, name, prompts))
            for name, each in found.items()
        }

    result: dict[str, Any] = lab.part(["engine", *map(list, ways.values())], run)
    return result


def _reference(lab: Lab, ways: dict[str, Way], name: str, prompts: list[Tokens]) -> list[Tokens]:
    return said(lab, ways.get(name, Way("recipient")), prompts)


def _compared(
    lab: Lab, prompts: list[Tokens], engine: list[Tokens], reference: list[Tokens]
) -> dict[str, Any]:
    return {
        "prompts": len(prompts),
        "same tokens": sum(a == b for a, b in zip(engine, reference, strict=True)),
        "engine": rate([int(cost) for cost in lab.refusals(prompts, engine)], of=1),
        "reference": rate([int(cost) for cost in lab.refusals(prompts, reference)], of=1),
    }


def _made(lab: Lab, ways: dict[str, Way]) -> list[Patch]:
    found = []
    for name, way in ways.items():
        if way.kind == "dynamic":
            units = units_of(chosen(lab, way), lab.shape)
            sites = [PatchSite(**site.model_dump()) for site in units]
            found.append(patches.from_vector(name, sites, lab.vector, lab.shape))
        else:
            made = stored(lab, way)
            found.append(Patch(made.card.model_copy(update={"name": name}), made.arrays))
    return found


def _answers(lab: Lab, ways: dict[str, Way], prompts: list[Tokens], folder: Path) -> dict[str, list[Tokens]]:
    """Answers of the engine, all prompts in all ways at once."""
    from guard.engine.config import AUDIENCE_ENV, EXTRA_ARG, KEY_FILE_ENV, GuardConfig

    keys = Keyring.generate()
    keys.save(folder / "keys")
    os.environ.update({**SETTINGS, KEY_FILE_ENV: str(folder / "keys"), AUDIENCE_ENV: AUDIENCE})
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    from guard.engine import selftest

    # Any probe will do: the rules below patch whatever it says.
    sites = (Site(layer=0, kind="mlp", units=tuple(range(16))),)
    bundle = make_bundle(folder / "probe", lab.weights, sites, [list(p) for p in prompts[:12]])
    bundle = Bundle.load(with_threshold(bundle, folder / "pass", 1.0))
    for patch in _made(lab, ways):
        bundle = bundle.with_patch(patch)
    bundle.save(folder / "bundle")
    llm = LLM(
        str(lab.weights),
        worker_cls="guard.engine.worker.GuardWorker",
        scheduler_cls="guard.engine.scheduler.guard_scheduler",
        additional_config=GuardConfig.for_bundle(str(folder / "bundle"), bundle).entry(),
        dtype="float32", max_model_len=512, enforce_eager=True, async_scheduling=False,
        max_num_batched_tokens=512, max_num_seqs=32, block_size=32,
    )  # fmt: skip
    selftest.run(llm, bundle.card.self_test.prompts)

    def parameters(name: str) -> Any:
        rule = Rule(above=0.0, action="patch", patch=name, still_unsafe="pass")
        decision = Decision(policy="check", rules=(rule,) if name in ways else ())
        sealed = Directive.issue(decision, audience=AUDIENCE, body=b"").seal(keys)
        return SamplingParams(max_tokens=lab.size.new_tokens, temperature=0.0, extra_args={EXTRA_ARG: sealed})

    order = [(name, prompt) for prompt in prompts for name in (*ways, "none")]
    outputs = llm.generate(
        [{"prompt_token_ids": list(prompt)} for _, prompt in order],
        [parameters(name) for name, _ in order],
        use_tqdm=False,
    )
    end = llm.get_tokenizer().eos_token_id
    found: dict[str, list[Tokens]] = {name: [] for name in (*ways, "none")}
    for (name, _), output in zip(order, outputs, strict=True):
        found[name].append(tuple(token for token in output.outputs[0].token_ids if token != end))
    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
    return found
