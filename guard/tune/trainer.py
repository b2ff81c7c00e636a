"""transformers' Trainer around a model of which some numbers train: checkpoints of these alone, no NaN.

The loop, schedules, accumulation, mixed precision and the state of optimiser, rates and random numbers in a
checkpoint are the library's. What is ours: the loss, what a checkpoint holds of the model, and the stop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from guard.tune.errors import DivergedError, TuneError
from guard.tune.objective import Collator, Item, dpo_loss, sft_loss
from guard.tune.options import TuneOptions

WEIGHTS_FILE = "trained.safetensors"
"""The numbers that train, in a checkpoint."""
_STATE_FILE = "trainer_state.json"
"""What the Trainer writes last: a checkpoint without it was interrupted."""


class Course(NamedTuple):
    """How a training went."""

    steps: int
    resumed_at: int
    """Step of the checkpoint that the run went on from; 0 for a whole run."""
    losses: list[tuple[int, float]]
    """Step and loss, in nats; the losses of an interrupted part are those its checkpoint remembers."""


def steps_of(rows: int, options: TuneOptions) -> int:
    """Optimiser steps of a run over so many rows."""
    return options.steps or max(1, math.ceil(options.epochs * math.ceil(rows / options.batch)))


def train(
    model: Any, items: Sequence[Item], options: TuneOptions, folder: Path, *, progress: bool = False
) -> Course:
    """Train what requires a gradient; go on at the last whole checkpoint in ``folder`` if there is one.

    Raises DivergedError when the loss is no number any more, TuneError when nothing trains.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise TuneError("no number of the model trains")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise TuneError("there is no CUDA device; choose device cpu")
    last = last_checkpoint(folder)
    steps = steps_of(len(items), options)
    trainer = _Trainer(
        model=model,
        args=_arguments(options, steps, folder),
        train_dataset=list(items),
        data_collator=Collator(options.first_token),
        options=options,
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(_Bar(steps, shown=progress))
    try:
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    finally:
        # The library wraps forward for mixed precision; the model goes back to who gave it.
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    found = [(int(row["step"]), float(row["loss"])) for row in trainer.state.log_history if "loss" in row]
    return Course(steps, int(last.name.rpartition("-")[2]) if last else 0, found)


def last_checkpoint(folder: Path) -> Path | None:
    """The latest checkpoint that is whole."""
    found = [path for path in folder.glob("checkpoint-*") if (path / _STATE_FILE).is_file()]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _arguments(options: TuneOptions, steps: int, folder: Path) -> TrainingArguments:
    at_once = options.at_once or options.batch
    kinds = {"plateau": "warmup_stable_decay", "constant": "constant_with_warmup"}
    warmup = round(options.warmup * steps)
    falling = {"num_decay_steps": max(1, (steps - warmup) // 2), "decay_type": "linear"}
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=options.batch // at_once,
        learning_rate=options.rate,
        lr_scheduler_type=kinds.get(options.schedule, options.schedule),
        lr_scheduler_kwargs=falling if options.schedule == "plateau" else None,
        warmup_steps=warmup,
        weight_decay=options.weight_decay,
        adam_beta2=options.beta2,
        max_grad_norm=options.clip,
        bf16=options.dtype == "bfloat16",
        use_cpu=options.device == "cpu",
        seed=options.seed,
        save_strategy="steps",
        save_steps=options.save_every,
        save_total_limit=2,
        logging_steps=1,
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=options.device == "cuda",
    )
    # Weights in part cannot be copied to several devices; one is used, and its place chosen from outside.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


class _Trainer(Trainer):  # type: ignore[misc]
    def __init__(self, *, options: TuneOptions, **settings: Any) -> None:
        super().__init__(**settings)
        self._options = options
        # A mean over a part of the batch, so that the Trainer divides by the number of parts.
        self.loss_is_scaled_for_ga = False

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        if self._options.objective == "dpo":
            return dpo_loss(model, inputs, self._options.beta)
        return sft_loss(model, inputs)

    def training_step(self, *given: Any, **more: Any) -> Tensor:
        loss: Tensor = super().training_step(*given, **more)
        self._check(loss, "loss")
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)
        self._check(norm, "gradient")
        return norm

    def _check(self, value: Any, what: str) -> None:
        # Before the optimiser's step: the weights are still those of the step before.
        if not math.isfinite(float(value)):
            last = last_checkpoint(Path(self.args.output_dir))
            kept = f"the last good checkpoint is {last}" if last else "no checkpoint had been due before"
            raise DivergedError(
                f"the {what} is {float(value)} at step {self.state.global_step + 1} of "
                f"{self.args.max_steps}, so the training was stopped and nothing was written; "
                f"{kept}; lower the rate, or train in float32"
            )

    def _trained(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {n: p.detach().cpu().contiguous() for n, p in self._trained().items()}, folder / WEIGHTS_FILE
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        saved = load_file(Path(resume_from_checkpoint) / WEIGHTS_FILE)
        there = self._trained()
        if saved.keys() != there.keys():
            raise TuneError(f"{resume_from_checkpoint} holds other weights than those that train; remove it")
        with torch.no_grad():
            for name, value in saved.items():
                there[name].copy_(value)


class _Bar(TrainerCallback):  # type: ignore[misc]
    """Steps and loss, in one line."""

    def __init__(self, steps: int, *, shown: bool) -> None:
        self._bar = tqdm(total=steps, desc="tuning", disable=not shown)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.n = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self._bar.n = state.global_step
            self._bar.set_postfix(loss=f"{float(logs['loss']):.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.close()
