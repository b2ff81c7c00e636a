"""The policy file: policies, who gets which, API keys, judges. Checked when it is read.

policies:
  default:
    mode: enforce                # or observe: score, report, answer as if nothing were there
    rules:                       # first match wins, on P(unsafe); left out: the engine's own rules
      - {above: {fpr: 0.001}, action: refuse}
      - {above: {fpr: 0.01}, action: escalate}       # the band between the two goes to the judge
      - {above: 0.2, action: tag}
    unscored_shape: refuse       # pass judges prompts that do not end as the chat template ends them, too
    prefix_cache: shared         # tenant keeps the engine's prefix cache apart for each tenant
    on_missing_verdict: closed   # open answers without a verdict and counts every such answer
    refusal: {style: message, text: "I can't help with that."}
    expose_score: false
    monitor: {fpr: 0.01, debounce: 4, text: keep}   # stop answers as they grow; left out: never
assign:                          # first match wins; no match: the policy named default
  - {tenant: acme, model: lab/tiny, policy: strict}
judges:                          # for action: escalate
  guard-8b: {base_url: "http://judge:8000/v1", model: guard, timeout_s: 2, on_error: refuse}
keys:                            # sha256 of each API key; none: loopback only
  - {sha256: "…", tenant: acme}  # policy: NAME here comes before assign
bundles: ["…"]                   # digests of the bundles to accept from the engine; left out: any
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, ValidationError, model_validator

from guard.verdict import EngineStatus
from service.judge_settings import Judge
from service.key_index import KeyIndex
from service.policy import BoundPolicy, FileModel, MisplacedError, Policy, PolicyError
from service.yaml_lines import FileError, Lines, read_file

DEFAULT_NAME = "default"

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Tenant = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
Right = Literal["chat", "checks", "admin"]
RIGHTS: tuple[Right, ...] = ("chat", "checks", "admin")


class Places:
    """Tells people where in the file something stands."""

    def __init__(self, path: Path | None, lines: Lines | None) -> None:
        self._path, self._lines = path, lines

    def spell(self, place: Sequence[int | str]) -> str:
        """File, line and field."""
        field = ".".join(str(part) for part in place if part not in _UNION_TAGS)
        if self._lines is None:
            return field
        return f"{self._path}, line {self._lines.of(place)}" + (f": {field}" if field else "")


def _chat_only() -> list[Right]:
    return ["chat"]


class ApiKey(FileModel):
    """One client key, known by its digest only."""

    sha256: Digest
    tenant: Tenant
    policy: str | None = None
    """None: what ``assign`` says for the tenant and the model asked for."""
    rights: list[Right] = Field(default_factory=_chat_only, min_length=1)
    requests_per_minute: int | None = Field(default=None, ge=1, le=100_000)
    """In any minute, of one gateway; None: no limit."""
    max_concurrent: int | None = Field(default=None, ge=1, le=100_000)
    """Requests at one time, of one gateway; None: no limit."""


class Assignment(FileModel):
    """Requests of this tenant, for this model, fall under this policy. What is left out is not looked at."""

    tenant: Tenant | None = None
    model: str | None = None
    policy: str

    def covers(self, tenant: str | None, model: str | None) -> bool:
        """Whether requests of ``tenant`` for ``model`` are meant."""
        return self.tenant in (None, tenant) and self.model in (None, model)


class Policies(FileModel):
    """The whole file."""

    policies: dict[Name, Policy] = Field(min_length=1)
    assign: list[Assignment] = Field(default_factory=list)
    judges: dict[Name, Judge] = Field(default_factory=dict)
    keys: list[ApiKey] = Field(default_factory=list)
    bundles: Annotated[list[Digest], Field(min_length=1)] | None = None
    """Digests of the bundles that the engine's guard may run (``neuronguard bundle show``); None: any."""

    _places: Places = PrivateAttr(default_factory=lambda: Places(None, None))

    @model_validator(mode="after")
    def _names_exist(self) -> Policies:
        if DEFAULT_NAME not in self.policies and (
            not self.keys or any(key.policy is None for key in self.keys)
        ):
            raise MisplacedError("there must be a policy named 'default'", "policies")
        for index, key in enumerate(self.keys):
            if key.policy is not None:
                self._known(key.policy, "keys", index, "policy")
        if len({key.sha256 for key in self.keys}) != len(self.keys):
            raise MisplacedError("the same sha256 stands in keys twice", "keys")
        tenants = {key.tenant for key in self.keys}
        for later, rule in enumerate(self.assign):
            self._known(rule.policy, "assign", later, "policy")
            if rule.tenant is not None and rule.tenant not in tenants:
                raise MisplacedError(f"no key has the tenant '{rule.tenant}'", "assign", later, "tenant")
            for earlier, other in enumerate(self.assign[:later]):
                if other.covers(rule.tenant, rule.model):
                    raise MisplacedError(
                        f"it can never match, because assign.{earlier} covers it", "assign", later
                    )
        return self

    @model_validator(mode="after")
    def _judges_exist(self) -> Policies:
        for name, policy in self.policies.items():
            for index, rule in enumerate(policy.rules or ()):
                if rule.action != "escalate":
                    continue
                place = ("policies", name, "rules", index)
                if rule.judge is not None and rule.judge not in self.judges:
                    raise MisplacedError(f"'{rule.judge}' is not under judges", *place, "judge")
                if rule.judge is None and len(self.judges) != 1:
                    raise MisplacedError(
                        f"'escalate' needs a judge, and there are {len(self.judges)} under judges; "
                        "name one with 'judge'",
                        *place,
                    )
        return self

    def _known(self, policy: str, *place: int | str) -> None:
        if policy not in self.policies:
            raise MisplacedError(f"it names '{policy}', which is not under policies", *place)

    @cached_property
    def key_index(self) -> KeyIndex[ApiKey]:
        """Finds keys."""
        return KeyIndex(self.keys)

    def accepts(self, bundle: str) -> bool:
        """Whether the engine's guard may run the bundle with this digest."""
        return self.bundles is None or bundle in self.bundles

    def policy_for(self, key: ApiKey | None, model: str | None) -> str:
        """The name of the policy of a request."""
        if key is not None and key.policy is not None:
            return key.policy
        tenant = key.tenant if key is not None else None
        return next((rule.policy for rule in self.assign if rule.covers(tenant, model)), DEFAULT_NAME)

    def bind(self, name: str, status: EngineStatus) -> BoundPolicy:
        """One policy against one engine. Raises PolicyError, which names file and line."""
        policy = self.policies[name]
        try:
            return BoundPolicy(name, policy, policy.resolve(name, status))
        except MisplacedError as error:
            raise PolicyError(f"{self._places.spell(('policies', name, *error.path))}: {error}") from error

    def judge(self, name: str | None) -> tuple[str, Judge]:
        """A judge by name; the only one for None."""
        name = next(iter(self.judges)) if name is None else name
        return name, self.judges[name]


def load_policies(path: Path | None) -> Policies:
    """Read the policy file, or the built-in policy when there is none.

    Raises PolicyError, which names file, line and field.
    """
    if path is None:
        return Policies(policies={DEFAULT_NAME: Policy()})
    try:
        data, lines = read_file(path, "policy file")
    except FileError as error:
        raise PolicyError(str(error)) from error
    places = Places(path, lines)
    try:
        policies = Policies.model_validate(data)
    except ValidationError as error:
        raise PolicyError(f"The policy file is wrong. {_first(error, places)}.") from error
    policies._places = places
    return policies


def bind(policies: Policies, status: EngineStatus) -> dict[str, BoundPolicy]:
    """Every policy of the file against one engine. Raises PolicyError."""
    return {name: policies.bind(name, status) for name in policies.policies}


def _first(error: ValidationError, places: Places) -> str:
    """The most telling of a validation's errors, with its place in the file."""
    found = error.errors(include_url=False)
    first = next((item for item in found if item["type"] in ("extra_forbidden", "value_error")), found[0])
    cause: Any = first.get("ctx", {}).get("error")
    place = places.spell((*first["loc"], *(cause.path if isinstance(cause, MisplacedError) else ())))
    if first["type"] == "extra_forbidden":
        return f"{place} is not a known key"
    return f"{place}: {first['msg'].removeprefix('Value error, ')}"


_UNION_TAGS = ("float", "AtRate", "list[PolicyRule]", "constrained-float")
