"""``scheduler_cls``: turns scores into verdicts before any token leaves the engine.

A token leaves the engine only through ``Scheduler.update_from_output`` (vllm/v1/core/sched/scheduler.py). A
request that must not be answered has its sampled token taken out of the runner's output before the base class
sees it: the base then emits nothing, advances no grammar and keeps the request running, and it is finished
here. ``min_tokens``, ``ignore_eos``, stop strings and structured output never come into play.

The verdict rides on the request's first output, in ``kv_transfer_params``, which the API-server process takes
out again (``guard.engine.frontend``). Cost for a step without a final prompt token: one set intersection.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.sampling_params import RequestOutputKind
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.sched.utils import check_stop
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.outputs import LogprobsLists
from vllm.v1.request import Request, RequestStatus

from guard.engine import compat
from guard.engine.config import (
    CONFIG_KEY,
    ENTRIES_KEY,
    EXTRA_ARG,
    STOP_KEY,
    GuardConfig,
    audience_from_env,
    keyring_from_env,
    verify_adapters,
    verify_served_model,
)
from guard.engine.errors import GuardStartupError
from guard.engine.ledger import STOPPING, Ledger, Rerun
from guard.engine.outputs import (
    IDLE_ATTRIBUTE,
    LOGITS_ATTRIBUTE,
    PREFIX_ATTRIBUTE,
    RUNNING_ATTRIBUTE,
    SLOTS_ATTRIBUTE,
    WATCHED_ATTRIBUTE,
)
from guard.engine.support import can_watch, refuse_too_few_slots, refuse_unsupported
from guard.engine.watch import Found
from guard.verdict import UNSCORED_SHAPE, Verdict

REFUSED_STOP_REASON = "guard:refused"
SHAPE_STOP_REASON = f"guard:{UNSCORED_SHAPE}"
"""``stop_reason`` for clients that talk to vLLM directly. Informative only: clients can forge it."""


if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler as _Scheduler
else:
    _Scheduler = object  # whichever of vLLM's comes next


class GuardMixin(_Scheduler):
    """A verdict between the sampled token and the client; stands in front of one of vLLM's schedulers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        compat.check()
        refuse_unsupported(self.vllm_config)
        config, model = GuardConfig.of(self.vllm_config), self.vllm_config.model_config
        bundle = config.load_bundle()
        verify_served_model(bundle, model.model, model.tokenizer, model.hf_text_config)
        verify_adapters(bundle, config.adapters)
        if unknown := config.default.patches - bundle.patches.keys():
            raise GuardStartupError(
                f"the default policy patches with {min(unknown)!r}, which is none of the bundle's patches "
                f"({', '.join(bundle.patches) or 'it has none'})"
            )
        refuse_too_few_slots(self.vllm_config, len(config.adapters))
        self._adapters = config.adapters
        # Who could name the salt of a patched run would find its blocks, or leave others in their place.
        self._salt = secrets.token_hex(16)
        self._untold: dict[str, list[int]] = {}
        self._keys = keyring_from_env()
        self.ledger = Ledger(
            bundle.card,
            bundle=bundle.digest,
            dtype=str(model.dtype).removeprefix("torch."),
            default=config.default,
            keys=self._keys,
            audience=audience_from_env(),
            adapters=tuple(config.adapters),
            watches=can_watch(bundle.card, self.vllm_config),
        )

    def add_request(self, request: Request) -> None:
        """Enter the request in the ledger, then schedule it."""
        if request.request_id not in self.requests:
            extra = request.sampling_params.extra_args if request.sampling_params else None
            self.ledger.open(
                request.request_id,
                prompt=request.prompt_token_ids,
                prompt_tokens=request.num_prompt_tokens,
                directive=extra.get(EXTRA_ARG) if extra else None,
                denied=denial(request, self._adapters),
                adapter=request.lora_request.lora_name if request.lora_request else None,
                fixed_form=request.use_structured_output,
            )
        super().add_request(request)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Schedule a step, and tell the workers when nobody in it waits for a verdict."""
        scheduler_output = super().schedule(*args, **kwargs)
        # Keys views walk the shorter side: nothing at all while no verdict is due.
        scheduled = scheduler_output.num_scheduled_tokens
        if scheduled.keys().isdisjoint(self.ledger.unjudged):
            setattr(scheduler_output, IDLE_ATTRIBUTE, True)
        if not scheduled.keys().isdisjoint(self.ledger.watched):
            setattr(scheduler_output, WATCHED_ATTRIBUTE, True)
        if slots := self.ledger.slots:
            here = {rid: slots[rid] for rid in slots.keys() & scheduled.keys()}
            setattr(scheduler_output, SLOTS_ATTRIBUTE, here)
        if self._untold:
            told = {rid: self._untold.pop(rid) for rid in self._untold.keys() & scheduled.keys()}
            setattr(scheduler_output, PREFIX_ATTRIBUTE, told)
        return scheduler_output

    def update_from_output(
        self, scheduler_output: Any, model_runner_output: Any
    ) -> dict[int, EngineCoreOutputs]:
        """Judge the requests whose prompt ended in this step; silence those that must not speak."""
        scheduled = scheduler_output.num_scheduled_tokens
        found: dict[str, Found] = {}
        if not scheduled.keys().isdisjoint(self.ledger.watched):
            found = self._watch(scheduler_output, model_runner_output)
        if scheduled.keys().isdisjoint(self.ledger.unjudged) and not found:
            return super().update_from_output(scheduler_output, model_runner_output)
        judged = self._judge(scheduler_output, model_runner_output)
        verdicts = {rid: found for rid, found in judged.items() if isinstance(found, Verdict)}
        reruns = {rid: found for rid, found in judged.items() if isinstance(found, Rerun)}
        stopped = [rid for rid, verdict in verdicts.items() if verdict.action in STOPPING]
        prefixes = {rid: tokens for rid, found in verdicts.items() if (tokens := self.ledger.prefix(found))}
        prompt_logprobs = {rid: model_runner_output.prompt_logprobs_dict.get(rid) for rid in prefixes}
        cut = [rid for rid, seen in found.items() if seen.cut]
        for rid in (*stopped, *reruns, *prefixes, *cut):
            _silence(model_runner_output, rid)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for rid, rerun in reruns.items():
            if (request := self.requests.get(rid)) is not None:
                self._send_back(request, salt=rerun.patch)
        for rid, tokens in prefixes.items():
            if (request := self.requests.get(rid)) is not None:
                self._begin_with(request, tokens, prompt_logprobs[rid], outputs)
        for engine_outputs in outputs.values():
            for output in engine_outputs.outputs:
                if (verdict := verdicts.get(output.request_id)) is not None:
                    output.kv_transfer_params = self._carry(verdict, output.kv_transfer_params)
                if (seen := found.get(output.request_id)) is not None:
                    output.kv_transfer_params = _tell(seen, output.kv_transfer_params)
        for rid in stopped:
            if (request := self.requests.get(rid)) is not None:
                self._stop(request, verdicts[rid], outputs)
        for rid in cut:
            if (request := self.requests.get(rid)) is not None:
                self._cut(request, found[rid], outputs)
        return outputs

    def _watch(self, scheduler_output: Any, model_runner_output: Any) -> dict[str, Found]:
        """Answers that have to be stopped at this step, or would have to be, by request id."""
        values = getattr(model_runner_output, RUNNING_ATTRIBUTE, None)
        tokens, row = model_runner_output.sampled_token_ids, model_runner_output.req_id_to_index
        found: dict[str, Found] = {}
        for rid in self.ledger.watched.keys() & scheduler_output.num_scheduled_tokens.keys():
            request = self.requests.get(rid)
            if request is None or not self._delivers(request) or not (tokens and len(tokens[row[rid]])):
                continue
            value = None if values is None else float(values[row[rid]])
            if (seen := self.ledger.watched[rid].see(value, request.num_output_tokens)) is not None:
                found[rid] = seen
        return found

    @staticmethod
    def _delivers(request: Request) -> bool:
        """Whether the base class will take this step's output for the request, or discards it whole."""
        stale = request.num_stale_output_tokens > 0 and request.drop_stale_output
        return not (request.is_finished() or stale)

    def _judge(self, scheduler_output: Any, model_runner_output: Any) -> dict[str, Verdict | Rerun]:
        """Verdicts of this step, and requests that have to run again, by request id."""
        logits: dict[str, float] = getattr(model_runner_output, LOGITS_ATTRIBUTE, {})
        tokens, row = model_runner_output.sampled_token_ids, model_runner_output.req_id_to_index
        verdicts: dict[str, Verdict | Rerun] = {}
        for rid in self.ledger.unjudged.intersection(scheduler_output.num_scheduled_tokens):
            request = self.requests.get(rid)
            if request is None or not self._delivers(request):
                continue
            logit = logits.get(rid)
            if logit is None and not (tokens and len(tokens[row[rid]])):
                continue  # a chunk before the last: neither score nor token
            verdicts[rid] = self.ledger.judge(rid, logit)
        return verdicts

    def _send_back(self, request: Request, *, salt: str | None = None) -> None:
        """Have a request computed again from its first token on, as after a preemption, in place.

        With ``salt``, its KV blocks are from here on neither found by nor taken from anybody else's: the salt
        is in the hash of the first block, and hashes chain (vllm/v1/core/kv_cache_utils.py). What is in
        flight for it is dropped when it comes back.
        """
        if salt is not None:
            request.cache_salt = f"{request.cache_salt or ''}|neuronguard:{self._salt}:{salt}"
            request.block_hashes.clear()
            request.update_block_hashes()
        # Or a request that the step in flight still holds would come back without its tokens.
        self.prev_step_scheduled_req_ids.discard(request.request_id)
        if request.status == RequestStatus.RUNNING:
            self.running.remove(request)
            self._preempt_request(request, time.monotonic(), drop_stale_output=True)
        else:  # preempted while the step was in flight: nothing is computed, nothing may be delivered
            request.drop_stale_output = True

    def _begin_with(
        self,
        request: Request,
        tokens: tuple[int, ...],
        prompt_logprobs: Any,
        outputs: dict[int, EngineCoreOutputs],
    ) -> None:
        """Make ``tokens`` the beginning of the answer, and let the model go on from there.

        Workers hold what they sampled, so the request goes back to the queue, and they learn its tokens anew.
        """
        given = list(tokens[: request.max_tokens])
        stats = request.take_prefill_stats()
        if stats is not None:
            stats.finalize(self.kv_cache_manager.estimate_cached_tokens(request))
        request.append_output_token_ids(given)
        if check_stop(request, self.max_model_len):
            status, request.status = request.status, RequestStatus.RUNNING
            self.finish_requests(request.request_id, status)
        else:
            self._send_back(request)
            self._untold[request.request_id] = given
        output = EngineCoreOutput(
            request_id=request.request_id,
            new_token_ids=given,
            new_logprobs=_certain(request, given),
            new_prompt_logprobs_tensors=prompt_logprobs,
            finish_reason=request.get_finished_reason(),
            stop_reason=request.stop_reason,
            events=request.take_events(),
            trace_headers=request.trace_headers,
            prefill_stats=stats,
        )
        outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(output)

    def _stop(self, request: Request, verdict: Verdict, outputs: dict[int, EngineCoreOutputs]) -> None:
        """Finish a request that shows no token, and say so to its client."""
        error = verdict.action == "error"
        stats = request.take_prefill_stats()
        if stats is not None:
            stats.finalize(self.kv_cache_manager.estimate_cached_tokens(request))
        if not error:
            request.stop_reason = (
                SHAPE_STOP_REASON if verdict.reason == UNSCORED_SHAPE else REFUSED_STOP_REASON
            )
        self.ledger.close(request.request_id)  # the output is made here, not by _free_request
        self.finish_requests(
            request.request_id, RequestStatus.FINISHED_ERROR if error else RequestStatus.FINISHED_STOPPED
        )
        tokens, logprobs = ([], None) if error else _stream_sentinel(request)
        output = EngineCoreOutput(
            request_id=request.request_id,
            new_token_ids=tokens,
            new_logprobs=logprobs,
            finish_reason=request.get_finished_reason(),
            stop_reason=request.stop_reason,
            events=request.take_events(),
            kv_transfer_params=self._carry(verdict, None),
            trace_headers=request.trace_headers,
            prefill_stats=stats,
        )
        outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(output)

    def _cut(self, request: Request, found: Found, outputs: dict[int, EngineCoreOutputs]) -> None:
        """Finish a request in the middle of its answer, and say so to its client."""
        if found.stop is not None:
            request.stop_reason = found.stop.reason(self._keys)
        verdict = self.ledger.close(request.request_id)  # the output is made here, not by _free_request
        failed = found.outcome == "failed"
        self.finish_requests(
            request.request_id, RequestStatus.FINISHED_ERROR if failed else RequestStatus.FINISHED_STOPPED
        )
        output = EngineCoreOutput(
            request_id=request.request_id,
            new_token_ids=[],
            finish_reason=request.get_finished_reason(),
            stop_reason=request.stop_reason,
            events=request.take_events(),
            kv_transfer_params=_tell(found, self._carry(verdict, None) if verdict else None),
            trace_headers=request.trace_headers,
        )
        outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(output)

    def _free_request(self, request: Request, delay_free_blocks: bool = False) -> Any:
        """The one exit of every request: finished, refused, aborted or failed.

        The verdict rides on the last output too: it is the only one that the offline ``LLM`` class returns.
        """
        verdict = self.ledger.close(request.request_id)
        self._untold.pop(request.request_id, None)
        params, encoder_params = super()._free_request(request, delay_free_blocks=delay_free_blocks)
        return (self._carry(verdict, params) if verdict else params), encoder_params

    def _carry(self, verdict: Verdict, params: dict[str, Any] | None) -> dict[str, Any]:
        return {**(params or {}), CONFIG_KEY: verdict.model_dump_json(), ENTRIES_KEY: len(self.ledger)}


class GuardScheduler(GuardMixin, Scheduler):
    """vLLM's scheduler with the guard in front."""


class GuardAsyncScheduler(GuardMixin, AsyncScheduler):
    """vLLM's asynchronous scheduler with the guard in front."""


def guard_scheduler(*args: Any, **kwargs: Any) -> GuardMixin:
    """``scheduler_cls``: the guard's scheduler for the engine's mode. vLLM calls it as it would a class."""
    asynchronous = kwargs["vllm_config"].scheduler_config.async_scheduling
    return (GuardAsyncScheduler if asynchronous else GuardScheduler)(*args, **kwargs)


def denial(request: Request, adapters: Mapping[str, str]) -> str | None:
    """Why a kind of request is failed closed, or None; ``adapters`` are those served, directory by name."""
    if request.sampling_params is None:
        return "pooling_request"
    if request.resumable:
        return "streaming_input"
    if request.prompt_token_ids is None or request.prompt_embeds is not None:
        return "prompt_embeddings"
    lora = request.lora_request
    if lora is not None and (adapters.get(lora.lora_name) != lora.lora_path or lora.load_inplace):
        return "lora_not_listed"
    return "multimodal" if request.mm_features else None


def _silence(model_runner_output: Any, request_id: str) -> None:
    index = model_runner_output.req_id_to_index[request_id]
    if model_runner_output.sampled_token_ids:
        model_runner_output.sampled_token_ids[index] = []
    # The base class asserts that a request without output has no prompt logprobs either.
    compat.drop_prompt_logprobs(model_runner_output, request_id)


def _tell(found: Found, params: dict[str, Any] | None) -> dict[str, Any]:
    tokens = found.stop.tokens if found.stop else None
    return {**(params or {}), STOP_KEY: {"outcome": found.outcome, "tokens": tokens}}


def _stream_sentinel(request: Request) -> tuple[list[int], LogprobsLists | None]:
    """One end-of-text token for direct streams, whose front end swallows an empty first output.

    With finish reason ``stop`` the detokenizer drops the last token (vllm/v1/engine/detokenizer.py), so the
    text stays empty and the client gets its final chunk. The token is not the model's: it is never sampled.
    """
    params = request.sampling_params
    if params.output_kind != RequestOutputKind.DELTA:
        return [], None
    token = params.eos_token_id or 0
    return [token], _certain(request, [token])


def _certain(request: Request, tokens: list[int]) -> LogprobsLists | None:
    """Log probability 0 for each token, if the client asked for any: the front end wants one row for each."""
    asked = request.sampling_params.num_logprobs
    if asked is None:
        return None
    shape = len(tokens), max(asked, 0) + 1
    return LogprobsLists(
        np.repeat(np.array(tokens, dtype=np.int32)[:, None], shape[1], axis=1),
        np.zeros(shape, dtype=np.float32),
        np.zeros(len(tokens), dtype=np.int32),
    )
