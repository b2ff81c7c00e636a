from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from guard.adapters import adapter_digest
from guard.bundle import Bundle, GuardCard
from guard.capture import read_batch
from guard.checkpoint import DTYPES, Checkpoint
from guard.self_test import measure
from tests.guard import worlds
from tests.guard.test_cli import run

TARGETS = ("q_proj", "o_proj", "gate_proj", "down_proj")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return worlds.checkpoint(tmp_path_factory.mktemp("m") / "model", worlds.model())


@pytest.fixture(scope="module", params=["linear", "mlp"])
def bundle(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a real self-test for ``model``."""
    checkpoint = Checkpoint.open(model)
    blank = worlds.bundle() if request.param == "linear" else worlds.mlp_bundle(5)
    measured = measure(checkpoint, blank.card.sites, blank.scorer)
    changes = {"model": checkpoint.card(), "self_test": measured.self_test}
    card = GuardCard.model_validate(blank.card.model_dump() | changes)
    return Bundle(card, blank.scorer).save(tmp_path_factory.mktemp("b") / "bundle")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return worlds.adapter(tmp_path / "lora", worlds.model(), TARGETS)


def listing(bundle: Path, model: Path, out: Path, *adapters: str) -> list[object]:
    named = [part for text in adapters for part in ("--adapter", text)]
    return ["bundle", "adapter", bundle, "--model", model, "--out", out, *named]


@pytest.fixture
def listed(bundle: Path, model: Path, adapter: Path, tmp_path: Path) -> Path:
    result = run(*listing(bundle, model, tmp_path / "listed", f"tuned={adapter}"))
    assert result.exit_code == 0, result.output
    return tmp_path / "listed"


def beside(model: Path, adapter: Path, dtype: torch.dtype) -> Any:
    """The adapter computed beside the weights, as vLLM does: y += scale · B (A x)."""
    apart = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
    tensors = {
        key: value.to(dtype) for key, value in load_file(adapter / "adapter_model.safetensors").items()
    }
    for key in [key for key in tensors if key.endswith("lora_A.weight")]:
        a, b = tensors[key], tensors[key.replace("lora_A", "lora_B")]
        module = apart.get_submodule(key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
        module.register_forward_hook(lambda _, x, y, a=a, b=b: y + 2.0 * (x[0] @ a.T) @ b.T)
    return apart


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_scores_under_the_adapter_are_those_of_one_that_is_not_merged(
    listed: Path, bundle: Path, model: Path, adapter: Path, dtype: str
) -> None:
    loaded, base = Bundle.load(listed), Bundle.load(bundle)
    (entry,) = loaded.card.adapters
    assert (entry.name, entry.rank, entry.sha256) == ("tuned", 4, adapter_digest(adapter))
    apart = beside(model, adapter, DTYPES[dtype])
    prompts, sites = loaded.card.self_test.prompts, loaded.card.sites
    features = np.concatenate([read_batch(apart, sites, [p]).detach().float().numpy() for p in prompts])
    found = loaded.logits(features)
    np.testing.assert_allclose(entry.self_test[dtype], found, rtol=0, atol=entry.tolerance[dtype])
    if dtype == "float32":
        np.testing.assert_allclose(entry.self_test[dtype], found, atol=2e-4)
    without = np.array(base.card.self_test.logits[dtype])
    assert np.abs(np.array(entry.self_test[dtype]) - without).max() > 3 * entry.tolerance[dtype]


def test_the_new_bundle_is_the_old_one_and_the_adapter(listed: Path, bundle: Path) -> None:
    new, old = Bundle.load(listed), Bundle.load(bundle)
    assert new.card.model_copy(update={"adapters": ()}) == old.card
    assert {k: v.tobytes() for k, v in new.scorer.arrays().items()} == {
        k: v.tobytes() for k, v in old.scorer.arrays().items()
    }
    assert new.digest != old.digest
    assert set(new.card.adapters[0].self_test) == set(old.card.self_test.logits)
    tolerance = new.card.adapters[0].tolerance
    assert tolerance["bfloat16"] > tolerance["float32"]


def test_it_is_shown_and_verified(listed: Path, model: Path, adapter: Path) -> None:
    assert f"adapter    tuned, rank 4, {adapter_digest(adapter)}" in run("bundle", "show", listed).output
    assert run("bundle", "verify", listed, "--model", model).exit_code == 0
    result = run("bundle", "verify", listed, "--model", model, "--adapter", f"tuned={adapter}")
    assert result.exit_code == 0, result.output
    assert "its scores come out under tuned=" in result.output


def test_an_adapter_that_is_not_the_listed_one_does_not_verify(
    listed: Path, model: Path, adapter: Path, tmp_path: Path
) -> None:
    other = worlds.adapter(tmp_path / "other", worlds.model(), TARGETS, seed=1)
    result = run("bundle", "verify", listed, "--model", model, "--adapter", f"tuned={other}")
    assert result.exit_code == 1
    assert "is not the 'tuned' that the bundle lists" in result.output
    result = run("bundle", "verify", listed, "--model", model, "--adapter", f"plain={adapter}")
    assert result.exit_code == 1
    assert "lists no adapter 'plain' (it lists: tuned)" in result.output


def test_recorded_scores_that_do_not_come_out_are_noticed(
    listed: Path, model: Path, adapter: Path, tmp_path: Path
) -> None:
    card = json.loads((listed / "guard.json").read_text())
    (entry,) = card["adapters"]
    entry["self_test"] = card["self_test"]["logits"]
    (listed / "guard.json").write_text(json.dumps(card))
    result = run("bundle", "verify", listed, "--model", model, "--adapter", f"tuned={adapter}")
    assert result.exit_code == 1
    assert "self-test scores in" in result.output


def test_adapters_are_added_one_to_another_under_names_of_their_own(
    listed: Path, model: Path, adapter: Path, tmp_path: Path
) -> None:
    other = worlds.adapter(tmp_path / "other", worlds.model(), TARGETS, seed=1, rank=2)
    result = run(*listing(listed, model, tmp_path / "two", f"second={other}"))
    assert result.exit_code == 0, result.output
    assert [a.name for a in Bundle.load(tmp_path / "two").card.adapters] == ["tuned", "second"]
    result = run(*listing(listed, model, tmp_path / "three", f"tuned={other}"))
    assert result.exit_code == 1
    assert "lists an adapter 'tuned' already" in result.output
    assert not (tmp_path / "three").exists()


def test_an_adapter_that_moves_no_score_is_pointed_out(bundle: Path, model: Path, tmp_path: Path) -> None:
    faint = worlds.adapter(tmp_path / "faint", worlds.model(), TARGETS, size=1e-6)
    result = run(*listing(bundle, model, tmp_path / "new", f"faint={faint}"))
    assert result.exit_code == 0, result.output
    assert "the self-test cannot tell whether it is on" in result.output


def test_a_listed_adapter_never_touches_the_checkpoint(
    bundle: Path, model: Path, adapter: Path, tmp_path: Path
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in model.iterdir()}
    assert run(*listing(bundle, model, tmp_path / "new", f"tuned={adapter}")).exit_code == 0
    assert {path.name: path.stat().st_mtime_ns for path in model.iterdir()} == before


def test_mistakes_are_one_sentence(bundle: Path, model: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    dora = worlds.adapter(tmp_path / "dora", worlds.model(), use_dora=True)
    elsewhere = worlds.checkpoint(tmp_path / "elsewhere", worlds.model(seed=9))
    out = tmp_path / "new"
    for arguments, code, message in (
        (listing(bundle, model, out, "tuned"), 2, "'tuned' is not NAME=DIR"),
        (listing(bundle, model, out, f"={adapter}"), 2, "is not NAME=DIR"),
        (listing(bundle, model, tmp_path / "mine", f"a={adapter}"), 2, "exists and is not a bundle"),
        (listing(bundle, model, out, f"a={tmp_path / 'nowhere'}"), 1, "holds no adapter_config.json"),
        (listing(bundle, model, out, f"a={dora}"), 1, "has what the guard does not compute: use_dora = True"),
        (listing(bundle, elsewhere, out, f"a={adapter}"), 1, "does not belong to the served model"),
    ):
        result = run(*arguments)
        assert result.exit_code == code, result.output
        assert message in result.output
        assert "Traceback" not in result.output
        assert not out.exists()


def test_evaluate_reads_and_answers_under_the_adapter(planted: worlds.Planted, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(planted.model)
    blank = worlds.bundle()
    measured = measure(checkpoint, blank.card.sites, blank.scorer)
    changes = {"model": checkpoint.card(), "self_test": measured.self_test}
    card = GuardCard.model_validate(blank.card.model_dump() | changes)
    bundle = Bundle(card, blank.scorer).save(tmp_path / "bundle")
    tuned = worlds.adapter(tmp_path / "lora", worlds.model(), TARGETS)
    figures = []
    # One cache for both: what was kept of the model alone must not be taken for the adapter's.
    for more in ([], ["--adapter", f"tuned={tuned}"], []):
        result = run(
            "evaluate", "--model", planted.model, "--bundle", bundle, "--eval-data", planted.evaluation,
            "--judged-tokens", 4, "--json", tmp_path / "q.json", "--markdown", tmp_path / "q.md", *more,
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        figures.append(json.loads((tmp_path / "q.json").read_text()))
        assert ("Under the LoRA adapter `tuned`" in (tmp_path / "q.md").read_text()) == bool(more)
    alone, under, again = figures
    assert alone == again
    assert under["adapter"] == {"name": "tuned", "sha256": adapter_digest(tuned)}
    assert under["evaluation"]["all_harmful"]["auroc"] != alone["evaluation"]["all_harmful"]["auroc"]
