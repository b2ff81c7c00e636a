from pathlib import Path

import pytest

from guard.verdict import Rule
from service.policy import PolicyError
from service.policy_file import bind, load_policies
from tests.service.fake_engine import a_status

KEY = "a" * 64
JUDGES = "{a: {base_url: 'http://judge/v1', model: m}}"


def load(folder: Path, text: str):
    file = folder / "policy.yaml"
    file.write_text(text)
    return load_policies(file)


def test_without_a_file_the_engines_default_is_enforced() -> None:
    bound = bind(load_policies(None), a_status())["default"]
    assert bound.decision.mode == "enforce"
    assert bound.decision.rules == (Rule(above=0.5, action="refuse"),)
    assert bound.policy.refusal.style == "message"
    assert bound.policy.refusal.text == "I can't help with that."
    assert bound.policy.on_missing_verdict == "closed"
    assert not bound.policy.expose_score


def test_fpr_becomes_the_probability_of_the_bundle_in_force(tmp_path: Path) -> None:
    policies = load(
        tmp_path,
        "policies: {default: {rules: [{above: {fpr: 0.01}, action: refuse}, {above: 0.3, action: tag}]}}",
    )
    bound = bind(policies, a_status())["default"]
    assert bound.decision.rules == (Rule(above=0.5, action="refuse"), Rule(above=0.3, action="tag"))
    assert bound.decision.policy == "default"


WRONG = {
    "unknown key": ("policies: {default: {mood: good}}", "policies.default.mood is not a known key"),
    "unknown top key": ("policies: {default: {}}\nextra: 1", "extra is not a known key"),
    "wrong mode": ("policies: {default: {mode: off}}", "policies.default.mode"),
    "no default": ("policies: {other: {}}", "there must be a policy named 'default'"),
    "empty file": ("", "valid dictionary"),
    "not yaml": ("policies: {", "not valid YAML"),
    "key twice": ("policies: {default: {mode: observe, mode: enforce}}", "the key 'mode' is given twice"),
    "patch without a name": (
        "policies: {default: {rules: [{above: 0.5, action: patch}]}}",
        "policies.default.rules.0: 'patch' needs the name of one of the bundle's patches",
    ),
    "patch of another action": (
        "policies: {default: {rules: [{above: 0.5, action: refuse, patch: mean}]}}",
        "policies.default.rules.0.patch: only a rule with the action 'patch' has patch",
    ),
    "escalate without a judge": (
        "policies: {default: {rules: [{above: 0.5, action: escalate}]}}",
        "policies.default.rules.0: 'escalate' needs a judge, and there are 0 under judges",
    ),
    "unknown judge": (
        f"policies: {{default: {{rules: [{{above: 0.5, action: escalate, judge: b}}]}}}}\njudges: {JUDGES}",
        "policies.default.rules.0.judge: 'b' is not under judges",
    ),
    "judge of another action": (
        f"policies: {{default: {{rules: [{{above: 0.5, action: tag, judge: a}}]}}}}\njudges: {JUDGES}",
        "only a rule with the action 'escalate' has a judge",
    ),
    "judge without address": (
        "policies: {default: {}}\njudges: {a: {base_url: judge, model: m}}",
        "base_url",
    ),
    "judge without end": (
        "policies: {default: {}}\njudges: {a: {base_url: 'http://j', model: m, timeout_s: 0}}",
        "judges.a.timeout_s",
    ),
    "assignment to nobody": (
        "policies: {default: {}}\nassign: [{tenant: a, policy: default}]",
        "assign.0.tenant: no key has the tenant 'a'",
    ),
    "assignment to no policy": (
        "policies: {default: {}}\nassign: [{model: m, policy: gone}]",
        "assign.0.policy: it names 'gone'",
    ),
    "dead assignment": (
        "policies: {default: {}}\nassign: [{policy: default}, {model: m, policy: default}]",
        "assign.1: it can never match, because assign.0 covers it",
    ),
    "unknown right": (
        f"policies: {{default: {{}}}}\nkeys: [{{sha256: {KEY}, tenant: a, rights: [root]}}]",
        "keys.0.rights.0",
    ),
    "unknown style": (
        "policies: {default: {refusal: {style: silent}}}",
        "policies.default.refusal.style",
    ),
    "status of what is no error": (
        "policies: {default: {refusal: {status: 400}}}",
        "policies.default.refusal.status: only the style 'error'",
    ),
    "no requests at all": (
        f"policies: {{default: {{}}}}\nkeys: [{{sha256: {KEY}, tenant: a, requests_per_minute: 0}}]",
        "keys.0.requests_per_minute",
    ),
    "above one": ("policies: {default: {rules: [{above: 1.5, action: refuse}]}}", "rules.0.above"),
    "nan": ("policies: {default: {rules: [{above: .nan, action: refuse}]}}", "rules.0.above"),
    "no rules": ("policies: {default: {rules: []}}", "policies.default.rules"),
    "dead rule": (
        "policies: {default: {rules: [{above: 0.4, action: tag}, {above: 0.6, action: refuse}]}}",
        "rule 2 can never match",
    ),
    "equal rules": (
        "policies: {default: {rules: [{above: 0.4, action: tag}, {above: 0.4, action: refuse}]}}",
        "rule 2 can never match",
    ),
    "dead rate": (
        "policies: {default: {rules: "
        "[{above: {fpr: 0.01}, action: tag}, {above: {fpr: 0.001}, action: refuse}]}}",
        "rule 2 can never match",
    ),
    "key without policy": (
        f"policies: {{default: {{}}}}\nkeys: [{{sha256: {KEY}, tenant: a, policy: gone}}]",
        "names 'gone'",
    ),
    "same key twice": (
        f"policies: {{default: {{}}}}\nkeys: [{{sha256: {KEY}, tenant: a}}, {{sha256: {KEY}, tenant: b}}]",
        "twice",
    ),
    "plain key": ("policies: {default: {}}\nkeys: [{sha256: sk-secret, tenant: a}]", "keys.0.sha256"),
    "name that is no label": ("policies: {default: {}, 'a b': {}}", "policies"),
    "boolean for a number": (
        "policies: {default: {rules: [{above: true, action: refuse}]}}",
        "rules.0.above",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_refused_with_file_and_field(name: str, tmp_path: Path) -> None:
    text, says = WRONG[name]
    with pytest.raises(PolicyError) as caught:
        load(tmp_path, text)
    message = str(caught.value)
    assert says in message
    assert "policy.yaml" in message
    assert "\n" not in message


TWO_RULES = """policies:
  default:
    rules:
      - {above: %s, action: tag}
      - {above: %s, action: refuse}
"""
LINES = {
    "policies:\n  default:\n    mode: enforce\n    mood: good\n": 4,
    TWO_RULES % (0.9, 1.5): 5,
    TWO_RULES % (0.4, 0.6): 5,
    "policies:\n  default: {}\nkeys:\n  - sha256: short\n    tenant: a": 4,
    "policies:\n  default: {}\nassign:\n  - policy: default\n  - model: m\n    policy: default\n": 5,
}


@pytest.mark.parametrize("text", LINES)
def test_a_wrong_file_is_refused_with_the_line(text: str, tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=rf"policy\.yaml, line {LINES[text]}: "):
        load(tmp_path, text)


ASSIGNED = f"""
policies: {{default: {{}}, strict: {{}}, lax: {{}}, own: {{}}}}
assign:
  - {{tenant: acme, model: m1, policy: strict}}
  - {{model: m1, policy: lax}}
  - {{tenant: acme, policy: own}}
keys:
  - {{sha256: {KEY}, tenant: acme}}
  - {{sha256: {"b" * 64}, tenant: other}}
  - {{sha256: {"c" * 64}, tenant: acme, policy: own}}
"""


@pytest.mark.parametrize(
    ("key", "model", "policy"),
    [(0, "m1", "strict"), (0, "m2", "own"), (1, "m1", "lax"), (1, "m2", "default"), (2, "m1", "own")],
)
def test_key_tenant_and_model_choose_the_policy(key: int, model: str, policy: str, tmp_path: Path) -> None:
    policies = load(tmp_path, ASSIGNED)
    assert policies.policy_for(policies.keys[key], model) == policy


def test_a_wrong_key_is_not_quoted(tmp_path: Path) -> None:
    with pytest.raises(PolicyError) as caught:
        load(tmp_path, "policies: {default: {}}\nkeys: [{sha256: sk-secret, tenant: a}]")
    assert "sk-secret" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="nowhere"):
        load_policies(tmp_path / "nowhere.yaml")


def test_a_rule_that_the_bundle_makes_dead_is_an_error(tmp_path: Path) -> None:
    policies = load(
        tmp_path,
        "policies: {default: {rules: [{above: 0.4, action: tag}, {above: {fpr: 0.001}, action: refuse}]}}",
    )
    with pytest.raises(
        PolicyError, match=r"line 1: policies.default.rules.1.above: .*rule 2 can never match"
    ):
        bind(policies, a_status())


def test_a_rate_that_the_bundle_does_not_have_is_an_error(tmp_path: Path) -> None:
    policies = load(tmp_path, "policies: {default: {rules: [{above: {fpr: 0.02}, action: refuse}]}}")
    with pytest.raises(PolicyError, match=r"fpr 0\.02.*0\.001, 0\.01, 0\.05"):
        bind(policies, a_status())


def test_a_patch_is_bound_to_one_that_the_bundle_has(tmp_path: Path) -> None:
    path = tmp_path / "policies.yaml"
    path.write_text(
        "policies: {default: {rules: [{above: 0.5, action: patch, patch: mean, still_unsafe: pass}]}}"
    )
    policies = load_policies(path)
    bound = bind(policies, a_status(patches=("zero", "mean")))["default"]
    assert bound.decision.rules == (Rule(above=0.5, action="patch", patch="mean", still_unsafe="pass"),)
    with pytest.raises(PolicyError, match="the bundle in force has no patch 'mean'; it has: zero"):
        bind(policies, a_status(patches=("zero",)))
