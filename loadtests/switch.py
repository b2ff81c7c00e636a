"""Turn the guard of a running engine off and on, so that both can be timed in one process.

Two processes of the same program differ by more than the guard costs (addresses, page placement, clock), and
the difference stays for as long as they run. Within one process it cancels. While the guard is off, nothing
of it is left in the step: worker, scheduler and runner have vLLM's own methods back, and no layer has a hook.
Only for an eager engine between two batches: what torch.compile or a CUDA graph has recorded cannot be taken
out.
"""

from __future__ import annotations

from collections import OrderedDict
from types import FunctionType
from typing import Any

from guard.engine.scheduler import GuardMixin
from guard.engine.worker import GuardWorker

_LAYOUT_METHODS = ("_prepare_inputs", "prepare_inputs")


class Switch:
    """The guard's places in an in-process guarded ``LLM``."""

    def __init__(self, llm: Any) -> None:
        engine = llm.llm_engine
        worker = engine.model_executor.driver_worker.worker
        scheduler = engine.engine_core.engine_core.scheduler
        if not (isinstance(worker, GuardWorker) and isinstance(scheduler, GuardMixin)):
            raise ValueError("this engine has no guard to turn off")
        # vLLM puts no hook on a layer: all there are belong to taps and patches.
        self._hooks = [
            (layer, layer._forward_pre_hooks, layer._forward_hooks)
            for layer in worker.model_runner.get_model().modules()
            if layer._forward_pre_hooks or layer._forward_hooks
        ]
        self._runner: dict[str, Any] = worker.model_runner.__dict__
        self._layout = {name: self._runner[name] for name in _LAYOUT_METHODS if name in self._runner}
        self._plain = [(worker.__dict__, _behind(GuardWorker, worker)),
                       (scheduler.__dict__, _behind(GuardMixin, scheduler))]  # fmt: skip

    def off(self) -> None:
        """Plain vLLM from the next batch on."""
        for attributes, methods in self._plain:
            attributes.update(methods)
        for layer, *_ in self._hooks:
            layer._forward_pre_hooks, layer._forward_hooks = OrderedDict(), OrderedDict()
        for name in self._layout:
            self._runner.pop(name, None)

    def on(self) -> None:
        """Guarded again."""
        for attributes, methods in self._plain:
            for name in methods:
                attributes.pop(name, None)
        for layer, before, after in self._hooks:
            layer._forward_pre_hooks, layer._forward_hooks = before, after
        self._runner.update(self._layout)


def _behind(guard: type, instance: Any) -> dict[str, Any]:
    """vLLM's own methods of ``instance``, bound, for those that ``guard`` overrides."""
    return {
        name: getattr(super(guard, instance), name)
        for name, value in vars(guard).items()
        if isinstance(value, FunctionType)
        and not name.startswith("__")
        and hasattr(super(guard, instance), name)
    }
