"""Engines for the end-to-end tests. Each start costs 10 to 30 seconds: they are shared by scope."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from guard.bundle import Bundle
from guard.cli import main
from guard.sealed import Keyring
from guard.signature import make_key
from loadtests.random_model import Reference
from tests.e2e import servers
from tests.e2e.servers import Stack
from tests.engine import world

DATA = Path(__file__).parent.parent / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """vLLM and its dependencies warn a lot; only what our own packages cause is an error here."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.e2e)
            for rule in ("ignore", "error:::guard", "error:::service"):
                item.add_marker(pytest.mark.filterwarnings(rule))


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keyring:
    return Keyring.generate()


@pytest.fixture(scope="session")
def key_file(keys: Keyring, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys"
    keys.save(path)
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world.make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def signing_key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A private key for signing bundles; the public one is beside it, ``.pub``."""
    path = tmp_path_factory.mktemp("signing") / "key"
    make_key(path)
    return path


@pytest.fixture(scope="session")
def tiny_bundle_dir(tiny_model: Path, signing_key: Path) -> Path:
    """A bundle with two patches, signed."""
    directory = tiny_model.parent / "tiny-bundle"
    world.make_bundle(directory, tiny_model)
    units = tiny_model.parent / "units.json"
    units.write_text(json.dumps({layer: list(range(0, 176, 2)) for layer in range(4)}))
    for name, *what in (("quiet", "--zero", "--units", str(units)), ("begun", "--prefix", "Well, ")):
        command = ["bundle", "patch", str(directory), "--model", str(tiny_model), "--name", name, *what]
        main([*command, "--out", str(directory)], standalone_mode=False)
    main(["bundle", "sign", str(directory), "--key", str(signing_key)], standalone_mode=False)
    return directory


@pytest.fixture(scope="session")
def tiny_bundle(tiny_bundle_dir: Path) -> Bundle:
    return Bundle.load(tiny_bundle_dir)


@pytest.fixture(scope="session")
def reference(tiny_model: Path) -> Reference:
    return world.make_reference(tiny_model)


@pytest.fixture(scope="session")
def everyday() -> list[str]:
    """270 harmless questions."""
    lines = (DATA / "everyday_prompts.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line)["prompt"] for line in lines]


@pytest.fixture(scope="session")
def shaped_bundle_dir(tiny_bundle: Bundle, tiny_model: Path) -> Path:
    """The same bundle, which says how prompts end: as the chat template ends them."""
    card = tiny_bundle.card.model_copy(update={"prompt_tails": (world.TAIL,)})
    return Bundle(card, tiny_bundle.scorer, tiny_bundle.patches.values()).save(tiny_model.parent / "shaped")


@pytest.fixture(scope="session")
def stack(
    tiny_model: Path, shaped_bundle_dir: Path, key_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    """A guarded vLLM server and a gateway, as real processes, on the tiny model."""
    folder = tmp_path_factory.mktemp("stack")
    with (
        servers.engine(tiny_model, shaped_bundle_dir, key_file, "tiny", folder / "engine.log") as engine_url,
        servers.gateway(engine_url, key_file, folder) as gateway_url,
    ):
        yield Stack(engine_url, gateway_url, folder)


@pytest.fixture(scope="session")
def prompts(reference: Reference, tiny_bundle: Bundle) -> tuple[list[int], list[int]]:
    """``(unsafe, safe)``: token-id prompts far from the threshold."""
    found = [[*p, *world.TAIL] for p in world.prompts(40, seed=41, shortest=25, longest=120)]
    logits = [float(tiny_bundle.logits(reference.features(p)[None])[0]) for p in found]
    unsafe = next(p for p, x in zip(found, logits, strict=True) if x > 0.5)
    safe = next(p for p, x in zip(found, logits, strict=True) if x < -0.5)
    return unsafe, safe


@pytest.fixture(scope="session")
def chats(reference: Reference, tiny_bundle: Bundle, everyday: list[str]) -> tuple[str, str]:
    """``(unsafe, safe)`` user messages by the tiny model's own lights."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(reference.model.name_or_path)

    def logit(text: str) -> float:
        messages = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        return float(tiny_bundle.logits(reference.features(ids)[None])[0])

    scored = sorted((logit(text), text) for text in everyday[:60])
    assert scored[-1][0] > 0.05
    assert scored[0][0] < -0.05
    return scored[-1][1], scored[0][1]
