"""The wire contract between gateway and engine: Directive in, Verdict out, and the engine's status.

    gateway  --POST body + header x-guard-directive: <sealed Directive>-->  engine's API server
    gateway  <--header x-guard-verdict: <sealed Verdict>-- (before the first byte of any answer)
    gateway  --GET /guard/status-->  EngineStatus, sealed by header x-guard-status-seal

Rules of the exchange:

- Without a directive the engine applies its own default policy, which enforces. With an invalid one the
  request is a 400 whose ``error.code`` is ``guard_directive_invalid``; nothing is generated.
- Every 2xx answer to a request that carried a directive has a verdict header with the directive's nonce. An
  answer without it, or with one that does not verify, must not be shown to a client.
- When the verdict's action is ``refuse``, ``escalate``, ``checked`` or ``error`` the body is an empty JSON
  object and holds no token of the model; whoever speaks to the client writes the refusal.
- ``escalate`` means: somebody else decides. To have the request answered after all, it is sent again under a
  new directive, whose rules pass what escalated before and still refuse what they refused.
- All siblings of one HTTP request (``n``, several prompts) share one binding verdict: the worst of them.

This module needs neither torch nor vLLM.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from guard.monitor import Monitor, MonitorThreshold
from guard.reference import ScoreReference
from guard.sealed import Keyring, SealError

DIRECTIVE_HEADER = "x-guard-directive"
VERDICT_HEADER = "x-guard-verdict"
STATUS_PATH = "/guard/status"
STATUS_SEAL_HEADER = "x-guard-status-seal"

Mode = Literal["enforce", "observe", "check"]
RuleAction = Literal["pass", "tag", "patch", "escalate", "refuse"]
ShapeAction = Literal["refuse", "pass"]
Action = Literal["pass", "tag", "patch", "escalate", "refuse", "checked", "error"]
# The order of severity: the binding verdict of siblings is the one that comes last here.
SEVERITY: tuple[Action, ...] = ("pass", "tag", "patch", "checked", "escalate", "refuse", "error")

UNSCORED_SHAPE = "unscored_shape"

# What can be wrong with a directive or a verdict besides its seal (``guard.sealed.SEAL_ERRORS``).
DIRECTIVE_ERRORS = (
    *("wrong_audience", "no_key_file", "expired", "wrong_body", "replayed"),
    "too_many_live_directives",
)
VERDICT_ERRORS = ("missing", "wrong_nonce", "other_order", "not_scored", "inconsistent")


class DirectiveError(ValueError):
    """A directive was refused; ``reason`` is one of a small fixed set of words, safe as a metric label."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the guard directive was refused: {reason}")
        self.reason = reason


class VerdictError(ValueError):
    """A verdict was refused; ``reason`` is one of a small fixed set of words, safe as a metric label."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the guard verdict was refused: {reason}")
        self.reason = reason


class _Wire(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Rule(_Wire):
    """First match wins: P(unsafe) at or above ``above`` leads to ``action``."""

    above: float = Field(ge=0.0, le=1.0)
    action: RuleAction
    patch: str | None = Field(default=None, min_length=1, max_length=64)
    """For ``patch``: the name of one of the bundle's patches."""
    still_unsafe: Literal["refuse", "pass"] = "refuse"
    """For ``patch``: what happens when the patched run's score leads to ``patch`` or ``refuse`` again."""

    @model_validator(mode="after")
    def _named(self) -> Rule:
        if (self.patch is not None) != (self.action == "patch"):
            raise ValueError("a rule names a patch if its action is patch, and only then")
        return self


class Decision(_Wire):
    """What to do with a score: the part of a policy that the engine has to know.

    ``enforce`` acts; ``observe`` answers as if nothing were there and reports what would have been done;
    ``check`` stops every request at its verdict and generates nothing.
    """

    policy: str = Field(min_length=1, max_length=64)
    mode: Mode = "enforce"
    rules: tuple[Rule, ...] = Field(max_length=8)
    unscored_shape: ShapeAction = "refuse"
    """What becomes of a prompt that does not end as the bundle's prompts do. ``pass``: the shape alone stops
    nothing; the rules judge the score, for which the bundle's error rates do not hold."""
    monitor: Monitor | None = None
    """What of the answer is watched as it grows; ``observe`` counts what would have been stopped."""

    def match(self, probability: float) -> Rule | None:
        """The first rule at or below ``probability``."""
        return next((rule for rule in self.rules if probability >= rule.above), None)

    def decide(self, probability: float) -> RuleAction:
        """The action of the first rule at or below ``probability``; ``pass`` when none matches."""
        rule = self.match(probability)
        return rule.action if rule else "pass"

    def outcome(
        self, probability: float, patched: float | None, *, unscored_shape: bool = False
    ) -> RuleAction:
        """What is done in mode ``enforce``; ``patched`` is P(unsafe) of the patched run, if there was one."""
        if self.refuses(unscored_shape):
            return "refuse"
        rule = self.match(probability)
        if rule is None:
            return "pass"
        if rule.action == "patch" and patched is not None and rule.still_unsafe == "refuse":
            return "patch" if self.decide(patched) in ("pass", "tag") else "refuse"
        return rule.action

    def refuses(self, unscored_shape: bool) -> bool:
        """Whether a prompt is refused for its shape, whatever its score."""
        return unscored_shape and self.unscored_shape == "refuse"

    @property
    def patches(self) -> set[str]:
        """The patches that its rules name."""
        return {rule.patch for rule in self.rules if rule.patch is not None}

    @property
    def threshold(self) -> float | None:
        """The lowest P(unsafe) that leads to a refusal, or None when nothing does."""
        return min((rule.above for rule in self.rules if rule.action == "refuse"), default=None)


class Directive(_Wire):
    """A gateway's signed order for one HTTP request to the engine."""

    version: Literal[1] = 1
    audience: str = Field(min_length=1, max_length=128)
    """Name of the engine that may accept it (``EngineStatus.audience``)."""
    expires: float
    """Unix time in seconds after which the engine's API server refuses it. Checked on arrival only."""
    nonce: str = Field(min_length=16, max_length=64)
    """Single use. Shared by the siblings of one HTTP request and repeated in the verdict."""
    body_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """SHA-256 of the forwarded body's bytes."""
    siblings: int = Field(ge=1, le=1024)
    """How many engine requests the body expands to: prompts times ``n``."""
    decision: Decision

    @classmethod
    def issue(
        cls, decision: Decision, *, audience: str, body: bytes, siblings: int = 1, lifetime: float = 30.0
    ) -> Directive:
        """A fresh directive for ``body``, valid for ``lifetime`` seconds."""
        return cls(
            audience=audience,
            expires=time.time() + lifetime,
            nonce=secrets.token_urlsafe(18),
            body_sha256=hashlib.sha256(body).hexdigest(),
            siblings=siblings,
            decision=decision,
        )

    def seal(self, keys: Keyring) -> str:
        """The sealed string that travels in the request header."""
        return keys.seal("directive", self.model_dump_json().encode())

    @classmethod
    def open(cls, text: str, keys: Keyring, *, audience: str) -> Directive:
        """Verify signature and audience. Expiry, body and single use are checked where the body is seen.

        Raises DirectiveError.
        """
        try:
            directive = cls.model_validate_json(keys.open("directive", text))
        except SealError as error:
            raise DirectiveError(str(error)) from error
        except ValidationError as error:
            raise DirectiveError("malformed") from error
        if directive.audience != audience:
            raise DirectiveError("wrong_audience")
        return directive


class Verdict(_Wire):
    """What the engine found and did for one request. ``probability`` is always P(unsafe)."""

    version: Literal[1] = 1
    action: Action
    """What was done. ``escalate`` ended the request for somebody else to decide; ``checked`` is mode
    ``check``'s; ``error`` failed closed."""
    decision: RuleAction | None
    """What the rules said; differs from ``action`` in the modes ``observe`` and ``check``. None on error."""
    probability: float | None = Field(ge=0.0, le=1.0)
    logit: float | None
    """The probe's raw output, before calibration."""
    threshold: float | None
    """The lowest P(unsafe) that leads to a refusal under the policy in force."""
    patch: str | None = None
    """The patch under which the answer is made, or was to be made before it was refused."""
    patched_probability: float | None = Field(default=None, ge=0.0, le=1.0)
    """P(unsafe) of the patched run, whose prompt is scored again; None for a prefix and without a patch."""
    unsafe: bool
    """Whether the rules say anything but ``pass``. True on error."""
    mode: Mode
    policy: str
    bundle: str
    """Digest of the bundle that was read."""
    read: Literal["prompt_last", "prompt", "nothing"]
    """Which positions the probe saw: the prompt's last token, or all of them."""
    unscored_shape: bool = False
    """Whether the prompt ends in another way than those the probe was fitted on, so that its score does not
    mean what the bundle says of scores; for siblings, whether any of their prompts does."""
    prompt_tokens: int = Field(ge=0)
    """Tokens of the prompt; for siblings, of all prompts of the HTTP request."""
    nonce: str | None = None
    """The directive's nonce; None for requests that came without one."""
    reason: str | None = None
    """For ``error``: a word from a small fixed set that says why there is no score. ``UNSCORED_SHAPE`` for a
    prompt that is refused for its shape."""

    def seal(self, keys: Keyring) -> str:
        """The sealed string that travels in the response header."""
        return keys.seal("verdict", self.model_dump_json().encode())

    @classmethod
    def open(cls, text: str, keys: Keyring, *, nonce: str) -> Verdict:
        """Verify signature and nonce. Raises VerdictError."""
        try:
            verdict = cls.model_validate_json(keys.open("verdict", text))
        except SealError as error:
            raise VerdictError(str(error)) from error
        except ValidationError as error:
            raise VerdictError("malformed") from error
        if verdict.nonce is None or not secrets.compare_digest(verdict.nonce, nonce):
            raise VerdictError("wrong_nonce")
        return verdict

    def worse_of(self, other: Verdict) -> Verdict:
        """The binding one of two siblings: the more severe action, then decision, then probability."""
        return max(self, other, key=lambda verdict: verdict._rank())

    def _rank(self) -> tuple[int, int, float]:
        decided = SEVERITY.index(self.decision or "error")
        probability = self.probability if self.probability is not None else 1.0
        return SEVERITY.index(self.action), decided, probability


class Threshold(_Wire):
    """An operating point of a bundle, set on benign prompts that were not used for fitting."""

    false_positive_rate: float = Field(gt=0.0, lt=1.0)
    probability: float = Field(ge=0.0, le=1.0)
    """P(unsafe) at and above which this rate of benign prompts is flagged."""
    logit: float
    benign: int
    """Number of benign prompts the threshold was set on."""
    upper95: float
    """Upper end of the 95 % interval of the true false-positive rate."""


EngineState = Literal["starting", "ready", "stopping", "failed"]
"""``stopping``: it still answers, and will soon be told to stop; requests should go elsewhere."""


class EngineStatus(_Wire):
    """Body of ``GET /guard/status``. HTTP 200 when ``state`` is ``ready``, else 503."""

    state: EngineState
    detail: str
    audience: str
    model: str
    """The served model name."""
    adapters: tuple[str, ...] = ()
    """Names of the LoRA adapters that are served beside it, each listed in the bundle."""
    max_model_len: int
    bundle: str
    """Digest of the bundle in force."""
    signed_by: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    """The public key that signed it (``guard.public_keys``); None: it is not signed."""
    reference: ScoreReference | None = None
    """The bundle's scores when it was fitted, which live ones are compared with; None: it has none."""
    label: Literal["unsafe_output", "harmful_prompt"]
    """Which question the bundle's probe answers."""
    thresholds: tuple[Threshold, ...]
    patches: tuple[str, ...] = ()
    """Names of the bundle's patches."""
    monitor: tuple[MonitorThreshold, ...] = ()
    """Where the bundle's probe can stop an answer; none: it watches no answers."""
    checks_shape: bool = True
    """Whether the bundle says how prompts end; without that, no shape is unscored."""
    default: Decision
    """What the engine applies to requests without a directive."""
    guard_version: str
    vllm_version: str

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that a client may ask for."""
        return (self.model, *self.adapters)

    @staticmethod
    def seal(body: bytes, keys: Keyring) -> str:
        """The header that goes with a status body. Thresholds come from here, so a gateway must trust it."""
        return keys.seal("status", hashlib.sha256(body).digest())

    @classmethod
    def open(cls, body: bytes, seal: str | None, keys: Keyring) -> EngineStatus:
        """Parse a status body. Raises ValidationError when it is none, SealError when it is forged."""
        status = cls.model_validate_json(body)
        if seal is None:
            raise SealError("missing")
        if not secrets.compare_digest(keys.open("status", seal), hashlib.sha256(body).digest()):
            raise SealError("other_body")
        return status
