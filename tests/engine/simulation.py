"""vLLM's schedulers with the guard in front, driven as vLLM's engine core drives them, without a model.

Schedulers, requests, block pool and their bookkeeping are vLLM's. One class stands in for worker and model
(``Runner``), one for the loop of vllm/v1/engine/core.py (``Engine``): its ``step`` with a queue of one step,
its ``step_with_batch_queue`` with two.
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field
from typing import Any

from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, DraftTokenIds, LogprobsTensors, ModelRunnerOutput
from vllm.v1.request import RequestStatus

from guard.engine.config import CONFIG_KEY
from guard.engine.ledger import STOPPING
from guard.engine.outputs import IDLE_ATTRIBUTE, LOGITS_ATTRIBUTE, SLOTS_ATTRIBUTE
from guard.verdict import Verdict
from tests.engine.kv import Blocks
from tests.engine.schedulers import DRAFTS, Mode, World
from tests.engine.schedules import PATCHED, SLOTS, Asked, Schedule, token


@dataclass
class Step:
    """A step that was launched."""

    scheduled: Any
    output: ModelRunnerOutput
    ends: set[str]
    """Requests whose prompt ends in it."""


class Runner:
    """Stands in for worker and model: it counts tokens, and names each by request and position."""

    def __init__(self, drafts: random.Random) -> None:
        self.numbers: dict[str, int] = {}
        self.logits: dict[str, float | None] = {}
        self.patched: dict[str, float] = {}
        """Logits of those that would score otherwise under a patch."""
        self.wants_logprobs: set[str] = set()
        self._prompt: dict[str, int] = {}
        self._known: dict[str, int] = {}
        self._random = drafts
        self.blocks = Blocks()

    def run(self, scheduled: Any) -> Step:
        if not scheduled.num_scheduled_tokens:
            return Step(scheduled, EMPTY_MODEL_RUNNER_OUTPUT, set())
        computed = {}
        for new in scheduled.scheduled_new_reqs:
            self._prompt[new.req_id] = len(new.prompt_token_ids)
            self._known[new.req_id] = len(new.prefill_token_ids or new.prompt_token_ids)
            computed[new.req_id] = new.num_computed_tokens
        cached = scheduled.scheduled_cached_reqs
        for rid, count, outputs in zip(
            cached.req_ids, cached.num_computed_tokens, cached.num_output_tokens, strict=True
        ):
            computed[rid] = count
            if rid in cached.resumed_req_ids:
                self._known[rid] = self._prompt[rid] + outputs
                # An asynchronous runner takes them from here (vllm/v1/worker/gpu_model_runner.py).
                assert not outputs or rid in cached.all_token_ids, "resumed without the tokens of its answer"
        # The order of a batch is the runner's own.
        names = sorted(scheduled.num_scheduled_tokens, reverse=True)
        slots = getattr(scheduled, SLOTS_ATTRIBUTE, {})
        self.blocks.follow(scheduled, slots)
        ends_at = {rid: computed[rid] + scheduled.num_scheduled_tokens[rid] for rid in names}
        self.blocks.compute({rid: (computed[rid], ends_at[rid]) for rid in names}, slots)
        tokens = [self._sample(scheduled, rid, computed[rid]) for rid in names]
        ends = {
            rid
            for rid in names
            if computed[rid] < self._prompt[rid] <= computed[rid] + scheduled.num_scheduled_tokens[rid]
        }
        output = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={rid: row for row, rid in enumerate(names)},
            sampled_token_ids=tokens,
        )
        for rid, sampled in zip(names, tokens, strict=True):
            if rid in self.wants_logprobs and sampled and rid in ends:
                output.prompt_logprobs_dict[rid] = LogprobsTensors.empty_cpu(1, 1)
        scores = self.logits | {rid: self.patched[rid] for rid in slots if rid in self.patched}
        logits = {rid: logit for rid in sorted(ends) if (logit := scores[rid]) is not None}
        if logits and not getattr(scheduled, IDLE_ATTRIBUTE, False):
            setattr(output, LOGITS_ATTRIBUTE, logits)
        return Step(scheduled, output, ends)

    def _sample(self, scheduled: Any, rid: str, computed: int) -> list[int]:
        drafts = scheduled.scheduled_spec_decode_tokens.get(rid, [])
        end = computed + scheduled.num_scheduled_tokens[rid] - len(drafts)
        assert end <= self._known[rid], "the scheduler counts a token that nobody sampled"
        if end < self._known[rid]:
            return []
        accepted = self._random.randint(0, len(drafts)) if drafts and -1 not in drafts else 0
        self._known[rid] = end + accepted + 1
        number = self.numbers[rid] + PATCHED * getattr(scheduled, SLOTS_ATTRIBUTE, {}).get(rid, 0)
        return [token(number, position) for position in range(end, end + accepted + 1)]

    def propose(self, scheduled: Any) -> DraftTokenIds:
        names = list(scheduled.num_scheduled_tokens)
        return DraftTokenIds(names, [[5] * self._random.randint(0, DRAFTS) for _ in names])


@dataclass
class Answer:
    """What the client of one request was sent."""

    tokens: list[int] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    aborted: bool = False

    @property
    def verdicts(self) -> list[Verdict | None]:
        """The verdict on each output."""
        carried = [(output.kv_transfer_params or {}).get(CONFIG_KEY) for output in self.outputs]
        return [text and Verdict.model_validate_json(text) for text in carried]

    @property
    def finished(self) -> str | None:
        """The finish reason, on the last output only."""
        assert all(output.finish_reason is None for output in self.outputs[:-1])
        reason = self.outputs[-1].finish_reason if self.outputs else None
        return None if reason is None else str(reason)


class Engine:
    """The engine core's loop around one scheduler. ``seen`` counts the awkward moments there were."""

    def __init__(self, world: World, mode: Mode, seed: int = 0) -> None:
        self.world, self.mode = world, mode
        self.scheduler = world.scheduler(mode)
        self.runner = Runner(random.Random(seed))
        self.queue: deque[Step] = deque()
        self.answers: dict[str, Answer] = defaultdict(Answer)
        self.seen: Counter[str] = Counter()
        self.preempted: set[str] = set()

    def add(self, name: str, prompt: list[int], asked: Asked, number: int, logit: float | None) -> None:
        self.runner.numbers[name], self.runner.logits[name] = number, logit
        if asked.order in SLOTS:
            self.runner.patched[name] = -abs(logit) if logit is not None else math.nan
        if asked.logprobs is not None:
            self.runner.wants_logprobs.add(name)
        self.scheduler.add_request(self.world.request(name, prompt, asked, number))

    def abort(self, name: str) -> None:
        if name not in self.scheduler.requests:
            return
        self.answers[name].aborted = True
        judging = any(name in step.ends for step in self.queue)
        unjudged = name in self.scheduler.ledger.unjudged
        flying = any(name in step.scheduled.num_scheduled_tokens for step in self.queue)
        self.seen["aborted while the step that judges it is in flight"] += judging and unjudged
        self.seen["aborted in flight"] += flying
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    def reset(self) -> None:
        self.preempted |= {request.request_id for request in self.scheduler.running}
        self.scheduler.reset_prefix_cache(reset_running_requests=True)

    def step(self, meanwhile: Any = lambda: None) -> None:
        """One turn of the loop; ``meanwhile`` is what happens while the output is awaited."""
        if self.scheduler.has_requests():
            scheduled = self.scheduler.schedule()
            for rid in scheduled.preempted_req_ids or ():
                when = "before" if rid in self.scheduler.ledger.unjudged else "after"
                self.seen[f"preempted {when} its verdict"] += 1
                self.preempted.add(rid)
            self.queue.append(self.runner.run(scheduled))
            if len(self.queue) < self.mode.queue and (
                scheduled.total_num_scheduled_tokens or self.scheduler.has_requests()
            ):
                meanwhile()
                return
        meanwhile()
        if self.queue:
            self._deliver(self.queue.popleft())

    def _deliver(self, step: Step) -> None:
        unjudged = step.ends & self.scheduler.ledger.unjudged
        for request in map(self.scheduler.requests.get, unjudged):
            if request is not None and request.num_stale_output_tokens > 0:
                how = "dropped" if request.drop_stale_output else "delivered"
                self.seen[f"preempted in flight of the step that judges it, output {how}"] += 1
        told = self.scheduler.update_from_output(step.scheduled, step.output)
        for output in told.get(0).outputs if 0 in told else ():
            answer = self.answers[output.request_id]
            assert not answer.aborted, "an output for a client that has gone"
            answer.outputs.append(output)
            answer.tokens += output.new_token_ids
            verdict = answer.verdicts[-1]
            if verdict is not None and verdict.action in STOPPING:
                later = any(output.request_id in step.scheduled.num_scheduled_tokens for step in self.queue)
                self.seen["stopped while its next token is in flight"] += later
        if self.mode.drafts and step.ends | set(step.output.req_ids):
            self.scheduler.update_draft_token_ids(self.runner.propose(step.scheduled))

    def finish(self) -> None:
        for _ in range(3000):
            if not (self.queue or self.scheduler.has_requests()):
                return
            self.step()
        raise AssertionError("the engine never comes to rest")

    def self_test(self) -> None:
        """Send the bundle's prompts through, with the scores that it says."""
        expected = self.world.bundle.card.self_test
        for i, prompt in enumerate(expected.prompts):
            logit = expected.logits["float32"][i]
            self.add(f"self-test-{i}", list(prompt), Asked(), 900 + i, logit)
        self.finish()


def simulate(world: World, mode: Mode, schedule: Schedule) -> Engine:
    """Run a schedule to its end. Requests are called by their number."""
    engine = Engine(world, mode, schedule.seed)
    waiting = dict(enumerate(schedule.asked))

    def arrive(when: Any) -> None:
        for number in [n for n, asked in waiting.items() if when(asked)]:
            asked = waiting.pop(number)
            engine.add(str(number), asked.prompt(number), asked, number, asked.logit(number))

    def interfere(now: int, late: bool) -> None:
        for number, asked in enumerate(schedule.asked):
            if asked.leaves == now and asked.leaves_late == late:
                engine.abort(str(number))
        if (now, late) in schedule.resets:
            engine.reset()

    arrive(lambda asked: asked.early)
    engine.self_test()
    moments = [asked.arrives for asked in schedule.asked] + [asked.leaves or 0 for asked in schedule.asked]
    for now in range(max([*moments, *(step for step, _ in schedule.resets)]) + 1):
        arrive(lambda asked, now=now: asked.arrives <= now)
        interfere(now, late=False)
        engine.step(lambda now=now: interfere(now, late=True))
    engine.finish()
    return engine
