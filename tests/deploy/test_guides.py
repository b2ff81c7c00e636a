"""The pages on clusters and releases: their links lead somewhere, and what they name exists here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from guard.engine.config import AUDIENCE_ENV, KEY_FILE_ENV, SIGNED_ENV
from guard.engine.launch import guard_arguments
from service.policy_file import load_policies
from service.settings import PREFIX, Settings
from tests.deploy.chart import EXAMPLES, of_kind, render
from tests.service.test_litellm import CONFIG

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
GUIDES = sorted((DOCS / "guides").glob("*.md"))
PAGES = [DOCS / "kubernetes.md", DOCS / "releasing.md", ROOT / "CHANGELOG.md", *GUIDES]
OTHERS = {AUDIENCE_ENV, KEY_FILE_ENV, SIGNED_ENV, f"{PREFIX}CONFIG", f"{PREFIX}CACHE", f"{PREFIX}LITELLM"}
OTHERS |= {f"{PREFIX}API_KEY"}  # LiteLLM's own environment, in its configuration
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as Git hosts make them."""
    headings = re.findall(r"^#+ +(.+?) *$", page.read_text("utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def blocks(name: str) -> list[Any]:
    """The YAML blocks of a guide."""
    text = (DOCS / "guides" / f"{name}.md").read_text("utf-8")
    return [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.S)]


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text("utf-8")):
        if link.startswith(("http://", "https://")):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@each_page
def test_every_variable_is_known(page: Path) -> None:
    named = set(re.findall(rf"\b{PREFIX}[A-Z_]+\b", page.read_text("utf-8")))
    compose = (ROOT / ".env").read_text("utf-8") + (ROOT / "docker-compose.yml").read_text("utf-8")
    known = {PREFIX + name.upper() for name in Settings.model_fields} | OTHERS
    assert all(name in known or name in compose for name in named), named - known


@each_page
def test_every_file_and_test_named_exists(page: Path) -> None:
    text = page.read_text("utf-8")
    for name in re.findall(
        r"`((?:deploy|tests|docs|loadtests|models|scripts|service|guard)/[\w./*-]+)`", text
    ):
        if page.stem in ("kserve", "production-stack") and name.startswith("docs/samples"):
            continue  # of the other project
        assert list(ROOT.glob(name.rstrip("/"))), name


def test_the_guides_say_what_was_read_and_what_was_run() -> None:
    for page in GUIDES:
        text = page.read_text("utf-8")
        assert "on 21 November 2026" in text, page.stem
        assert re.search(r"\*\*(Not run|Run)\b", text), page.stem


def test_engines_of_the_production_stack_are_where_our_example_looks_for_them() -> None:
    (values,) = blocks("production-stack")
    spec = values["servingEngineSpec"]
    example = yaml.safe_load(EXAMPLES["external-engines"].read_text("utf-8"))
    assert example["gateway"]["engineUrls"] == [
        f"http://vllm-{model['name']}-engine-service" for model in spec["modelSpec"]
    ]
    assert example["networkPolicy"]["externalEngines"].items() <= spec["labels"].items()
    assert values["routerSpec"]["enableRouter"] is False
    for model in spec["modelSpec"]:
        assert model["replicaCount"] == 1
        _as_ours(model["env"], model["extraVolumes"], model["extraVolumeMounts"])
        assert {KEY_FILE_ENV, AUDIENCE_ENV} <= {each["name"] for each in model["env"]}
        assert "--shutdown-timeout" in model["vllmConfig"]["extraArgs"]


def test_the_engine_of_kserve_is_started_as_ours() -> None:
    (service,) = blocks("kserve")
    pod = service["spec"]["template"]
    (container,) = pod["containers"]
    assert container["command"] == ["python3", "-m", "guard.engine"]
    options, rest = guard_arguments().parse_known_args(container["args"])
    assert (options.bundle, options.key_file) == ("/bundle", "/run/secrets/shared/guard.keys")
    assert "--shutdown-timeout" in rest
    _as_ours([], pod["volumes"], container["volumeMounts"])
    chart = of_kind(render("gpu"), "StatefulSet")["guarded-neuronguard-engine"]["spec"]["template"]["spec"]
    ours = chart["containers"][0]
    assert container["lifecycle"] == ours["lifecycle"]
    assert container["readinessProbe"]["httpGet"]["path"] == ours["readinessProbe"]["httpGet"]["path"]
    assert pod["terminationGracePeriodSeconds"] == chart["terminationGracePeriodSeconds"]


def _as_ours(env: list[Any], volumes: list[Any], mounts: list[Any]) -> None:
    """The key ring is the chart's secret, readable by the group alone, and every mount has its volume."""
    by_name = {volume["name"]: volume for volume in volumes}
    assert by_name["key-ring"]["secret"] == {"secretName": "neuronguard-key-ring", "defaultMode": 0o440}
    assert all(mount["name"] in by_name and mount["readOnly"] for mount in mounts)
    for each in env:
        if each["name"] == KEY_FILE_ENV:
            assert each["value"].startswith("/run/secrets/shared/")


def test_litellm_is_configured_as_in_the_test_with_its_proxy(tmp_path: Path) -> None:
    guide, policies, _ = blocks("litellm")
    tested = yaml.safe_load(CONFIG.format(model="m", gateway="g"))["guardrails"][0]
    (shown,) = guide["guardrails"]
    assert shown["litellm_params"].keys() == tested["litellm_params"].keys()
    for name in ("guardrail", "mode", "api_key", "default_on"):
        assert shown["litellm_params"][name] == tested["litellm_params"][name]
    (key,) = policies["keys"]
    file = tmp_path / "policies.yaml"
    file.write_text(yaml.safe_dump({"policies": {"default": {}}, "keys": [key | {"sha256": "a" * 64}]}))
    (loaded,) = load_policies(file).keys
    assert set(loaded.rights) == {"checks"}
