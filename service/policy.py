"""Policies and API keys: one YAML file, checked when it is read, resolved against the engine's thresholds.

    policies:
      default:
        mode: enforce                # or observe: score, report, answer as if nothing were there
        rules:                       # first match wins, on P(unsafe); left out: the engine's own rules
          - {above: {fpr: 0.01}, action: refuse}
          - {above: 0.2, action: tag}
        on_missing_verdict: closed   # open answers without a verdict and counts every such answer
        refusal: {style: message, text: "I can't help with that."}
        expose_score: false
    keys:                            # sha256 of each API key; none: loopback only
      - {sha256: "…", tenant: acme, policy: default}
    bundles: ["…"]                   # digests of the bundles to accept from the engine; left out: any

A rule that can never match is an error: when it is read if both thresholds are of one kind, otherwise as soon
as the engine has told what its false-positive rates mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from guard.verdict import Decision, EngineStatus, Rule
from service.errors import ConfigError

DEFAULT_TEXT = "I can't help with that."
DEFAULT_NAME = "default"


class PolicyError(ConfigError):
    """A policy file, or a policy against the bundle in force, makes no sense."""


def _supported(what: str, later: tuple[str, ...]) -> BeforeValidator:
    """Refuse by name what the file format foresees and this version does not do."""

    def check(value: object) -> object:
        if value in later:
            raise ValueError(f"{what} '{value}' is not yet supported")
        return value

    return BeforeValidator(check)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


class AtRate(_File):
    """The bundle's threshold for a false-positive rate on benign prompts."""

    fpr: float = Field(gt=0.0, lt=1.0)


class PolicyRule(_File):
    """P(unsafe) at or above ``above`` leads to ``action``."""

    above: Annotated[float, Field(ge=0.0, le=1.0)] | AtRate
    action: Annotated[Literal["pass", "tag", "refuse"], _supported("action", ("patch", "escalate"))]


class Refusal(_File):
    """What a client gets in place of an answer."""

    style: Annotated[Literal["message", "content_filter"], _supported("style", ("azure", "error"))] = (
        "message"
    )
    text: str = Field(default=DEFAULT_TEXT, min_length=1, max_length=4000)


class Policy(_File):
    """What to do with a score, and how to tell the client."""

    mode: Literal["enforce", "observe"] = "enforce"
    rules: Annotated[list[PolicyRule], Field(min_length=1, max_length=8)] | None = None
    """None: the rules of the engine's default decision."""
    on_missing_verdict: Literal["closed", "open"] = "closed"
    refusal: Refusal = Refusal()
    expose_score: bool = False

    @model_validator(mode="after")
    def _every_rule_can_match(self) -> Policy:
        for later, rule in enumerate(self.rules or ()):
            for earlier, other in enumerate((self.rules or ())[:later]):
                if _hides(other.above, rule.above):
                    raise ValueError(_dead(later, earlier))
        return self

    def resolve(self, name: str, status: EngineStatus) -> Decision:
        """The engine's part of the policy, with every ``fpr`` replaced by this bundle's probability.

        Raises PolicyError when the bundle has no such threshold or a rule can never match.
        """
        if self.rules is None:
            return Decision(policy=name, mode=self.mode, rules=status.default.rules)
        rules = tuple(
            Rule(above=_probability(name, rule.above, status), action=rule.action) for rule in self.rules
        )
        for later, rule in enumerate(rules):
            for earlier, other in enumerate(rules[:later]):
                if other.above <= rule.above:
                    raise PolicyError(
                        f"policies.{name}.rules with the bundle in force: {_dead(later, earlier)}"
                    )
        return Decision(policy=name, mode=self.mode, rules=rules)


Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ApiKey(_File):
    """One client key, known by its digest only."""

    sha256: Digest
    tenant: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")
    policy: str = DEFAULT_NAME


PolicyName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]


class Policies(_File):
    """The whole file."""

    policies: dict[PolicyName, Policy] = Field(min_length=1)
    keys: list[ApiKey] = []
    bundles: Annotated[list[Digest], Field(min_length=1)] | None = None
    """Digests of the bundles that the engine's guard may run (``neuronguard bundle show``); None: any."""

    @model_validator(mode="before")
    @classmethod
    def _not_yet(cls, data: object) -> object:
        if isinstance(data, dict):
            if "judges" in data:
                raise ValueError("'judges' is not yet supported")
            keys = data.get("keys")
            for key in keys if isinstance(keys, list) else ():
                if isinstance(key, dict) and "requests_per_minute" in key:
                    raise ValueError("'requests_per_minute' in keys is not yet supported")
        return data

    @model_validator(mode="after")
    def _names_exist(self) -> Policies:
        if not self.keys and DEFAULT_NAME not in self.policies:
            raise ValueError("without keys there must be a policy named 'default'")
        for index, key in enumerate(self.keys):
            if key.policy not in self.policies:
                raise ValueError(f"keys.{index}.policy names '{key.policy}', which is not under policies")
        if len({key.sha256 for key in self.keys}) != len(self.keys):
            raise ValueError("the same sha256 stands in keys twice")
        return self

    def accepts(self, bundle: str) -> bool:
        """Whether the engine's guard may run the bundle with this digest."""
        return self.bundles is None or bundle in self.bundles


@dataclass(frozen=True)
class BoundPolicy:
    """A policy as it is in force with one engine status."""

    name: str
    policy: Policy
    decision: Decision


def load_policies(path: Path | None) -> Policies:
    """Read the policy file, or the built-in policy when there is none.

    Raises PolicyError, which names the file and the field.
    """
    if path is None:
        return Policies(policies={DEFAULT_NAME: Policy()})
    try:
        data = yaml.load(path.read_text("utf-8"), Loader=_UniqueKeys)  # noqa: S506 -- a SafeLoader
    except (OSError, UnicodeDecodeError) as error:
        raise PolicyError(f"Cannot read the policy file {path}: {error}.") from error
    except yaml.YAMLError as error:
        raise PolicyError(
            f"The policy file {path} is not valid YAML: {' '.join(str(error).split())}."
        ) from error
    try:
        return Policies.model_validate(data)
    except ValidationError as error:
        raise PolicyError(f"The policy file {path} is wrong: {_first(error)}.") from error


def bind(policies: Policies, status: EngineStatus) -> dict[str, BoundPolicy]:
    """Every policy of the file against one engine. Raises PolicyError."""
    return {
        name: BoundPolicy(name, policy, policy.resolve(name, status))
        for name, policy in policies.policies.items()
    }


def _hides(earlier: float | AtRate, later: float | AtRate) -> bool:
    """Whether ``later`` is never reached; False when only the bundle can tell."""
    if isinstance(earlier, AtRate) and isinstance(later, AtRate):
        return earlier.fpr >= later.fpr  # a higher rate is a lower threshold
    if isinstance(earlier, AtRate) or isinstance(later, AtRate):
        return False
    return earlier <= later


def _dead(later: int, earlier: int) -> str:
    return (
        f"rule {later + 1} can never match, because rule {earlier + 1} matches everything that it would; "
        "put the higher threshold first"
    )


def _probability(name: str, above: float | AtRate, status: EngineStatus) -> float:
    if not isinstance(above, AtRate):
        return above
    for threshold in status.thresholds:
        if math.isclose(threshold.false_positive_rate, above.fpr, rel_tol=1e-9):
            return threshold.probability
    known = ", ".join(f"{threshold.false_positive_rate:g}" for threshold in status.thresholds) or "none"
    raise PolicyError(
        f"policies.{name}.rules asks for fpr {above.fpr:g}, "
        f"but the bundle in force has thresholds for: {known}"
    )


def _first(error: ValidationError) -> str:
    """The most telling of a validation's errors, with its place in the file."""
    found = error.errors(include_url=False)
    first = next((item for item in found if item["type"] in ("extra_forbidden", "value_error")), found[0])
    place = ".".join(str(part) for part in first["loc"] if part not in _UNION_TAGS)
    if first["type"] == "extra_forbidden":
        return f"{place} is not a known key"
    message = first["msg"].removeprefix("Value error, ")
    return f"{place}: {message}" if place else message


_UNION_TAGS = ("float", "AtRate", "list[PolicyRule]", "constrained-float")


class _UniqueKeys(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, where YAML itself would keep the last one in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key}' is given twice", node.start_mark
                )
        return super().construct_mapping(node, deep)
