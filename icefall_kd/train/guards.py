"""What protects a training: unused parameters, running out of memory, non-finite losses, frozen metrics."""

import logging
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from icefall_kd.data.batch import Batch
from icefall_kd.errors import ConfigError, NumericError
from icefall_kd.runtime.files import write_json
from icefall_kd.systems.base import LossTerms, System, parts

logger = logging.getLogger(__name__)

# Share of --max-duration that is proposed after the memory was exhausted.
OOM_SHRINK = 0.75


def parameters_without_gradient(system: nn.Module) -> list[str]:
    """Return the names of the trainable parameters that the last backward left without a gradient."""
    return [name for name, p in system.named_parameters() if p.requires_grad and p.grad is None]


def refuse_unused(names: Sequence[str]) -> None:
    """Raise a ConfigError that names the parameters without a gradient, if there are any."""
    if names:
        listed = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
        raise ConfigError(
            f"{len(names)} parameters receive no gradient from any active loss: {listed}; build only the modules that "
            "active losses use, or give them requires_grad=False"
        )


@contextmanager
def unchanged(system: nn.Module) -> Iterator[None]:
    """Give back random generators, buffers, gradients and the training mode as they were."""
    buffers = {name: b.detach().clone() for name, b in system.named_buffers()}
    states = (random.getstate(), np.random.get_state(), torch.get_rng_state())
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    training = system.training
    try:
        yield
    finally:
        system.zero_grad(set_to_none=True)
        system.train(training)
        with torch.no_grad():
            for name, buffer in system.named_buffers():
                if name in buffers:
                    buffer.copy_(buffers[name])
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether ``error`` says that memory is exhausted, on a GPU or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    said = ("out of memory", "can't allocate memory", "STATUS_ALLOC_FAILED")  # CUDA, the host, cuBLAS and cuDNN
    return isinstance(error, RuntimeError) and any(words in text for words in said)


def batch_shapes(batch: Batch) -> dict[str, Any]:
    """Return ids, shapes and lengths of a batch, without its audio, features or texts."""
    shapes: dict[str, Any] = {"ids": batch.ids, "durations": batch.durations, "utterances": len(batch)}
    for name in ("features", "audio", "y"):
        tensor = getattr(batch, name)
        if tensor is not None:
            shapes[name] = list(tensor.shape)
    for name in ("x_lens", "audio_lens", "y_lens"):
        tensor = getattr(batch, name)
        if tensor is not None:
            shapes[name] = tensor.tolist()
    # The first field of every kind of labels is the one with all dimensions.
    shapes["labels"] = {name: list(getattr(x, fields(x)[0].name).shape) for name, x in batch.labels.items()}
    return shapes


def _suggest_max_duration(batch: Batch, max_duration: float) -> float:
    """Return a --max-duration that would have kept a batch like this one smaller, in seconds."""
    padded = len(batch) * max(batch.durations) if batch.durations else max_duration
    smaller = OOM_SHRINK * min(max_duration, padded)
    return math.floor(smaller) if smaller >= 1 else round(smaller, 2)


def out_of_memory(error: BaseException, batch: Batch, where: str, file: Path, max_duration: float) -> ConfigError:
    """Dump the shapes of the batch that exhausted the memory and return the error to raise."""
    suggestion = _suggest_max_duration(batch, max_duration)
    remedy = f"--max-duration {suggestion:g} (now {max_duration:g})"
    if len(batch) == 1:
        # No smaller batch exists: this utterance has to go, or the model has to shrink.
        remedy = f"--max-utt-duration {suggestion:g} or a smaller model"
    write_json(
        file,
        {
            "where": where,
            "error": str(error).splitlines()[0] if str(error) else type(error).__name__,
            "max_duration": max_duration,
            "suggested_max_duration": suggestion,
            "batch": batch_shapes(batch),
        },
    )
    tokens = f", longest text {int(batch.y_lens.max())} tokens" if batch.y_lens is not None else ""
    shape = tuple(batch.features.shape) if batch.features is not None else "no features"
    return ConfigError(
        f"out of memory {where}: {len(batch)} utterances, features {shape}{tokens}; "
        f"ids and shapes are in {file}; try {remedy}"
    )


def scan_worst_batches(
    system: System,
    batches: Sequence[Batch],
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
    exp_dir: Path,
    max_duration: float,
    rank: int = 0,
    step: int = 0,
    reserve: int = 0,
) -> None:
    """Run forward and backward on the memory-worst batches with all losses; the training is left unchanged.

    Args:
        system: not wrapped for distributed training.
        batches: what the data module thinks needs most memory.
        device: where the system is.
        autocast: makes the context of the forward pass.
        exp_dir, rank: where and under which name a dump is written.
        max_duration: seconds of audio a batch, for the suggestion.
        step: the step whose warm-ups apply.
        reserve: bytes that training will need besides (the optimizer's state), taken meanwhile.
    Raises:
        ConfigError: the memory does not suffice, or parameters receive no gradient from any of the batches.
    """
    if not batches:
        return
    without: set[str] | None = None
    with unchanged(system):
        system.train()
        reserved = None
        for i, batch in enumerate(batches):
            system.zero_grad(set_to_none=True)
            try:
                if reserved is None:
                    reserved = torch.empty(reserve, dtype=torch.uint8, device=device)
                moved = batch.to(device)
                for part in parts(system, moved, step):
                    with autocast():
                        terms = system(moved, step, part)
                    terms.total.backward()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                where = f"in the scan before training (batch {i + 1} of {len(batches)})"
                file = exp_dir / f"oom-scan-rank{rank}.json"
                raise out_of_memory(error, batch, where, file, max_duration) from error
            missing = set(parameters_without_gradient(system))
            without = missing if without is None else without & missing
    ordered = [name for name, _ in system.named_parameters() if name in (without or ())]
    refuse_unused(ordered)
    peak = f", peak {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB" if device.type == "cuda" else ""
    logger.info("the %d memory-worst batches fit%s; every parameter receives a gradient", len(batches), peak)


def describe_non_finite(terms: LossTerms, batch: Batch) -> dict[str, Any]:
    """Name the loss terms that are not finite and the utterances they come from."""
    report: dict[str, Any] = {}
    for name, term in terms.terms.items():
        if bool(torch.isfinite(term.value.detach()).all()):
            continue
        culprits = list(batch.ids)
        if term.per_utterance is not None:
            bad = (~torch.isfinite(term.per_utterance)).nonzero().flatten().tolist()
            culprits = [batch.ids[i] for i in bad]
        report[name] = {"value": str(float(term.value.detach())), "utterances": culprits}
    if not report:
        report["total"] = {"value": str(float(terms.total.detach())), "utterances": list(batch.ids)}
    return report


class NonFiniteGuard:
    """Counts skipped steps and ends the training after too many in a row.

    Args:
        max_skips: steps in a row that may be skipped.
        exp_dir, rank: where and under which name the dump is written.
    """

    def __init__(self, max_skips: int, exp_dir: Path, rank: int = 0) -> None:
        self.max_skips = max_skips
        self.exp_dir = exp_dir
        self.rank = rank
        self.in_a_row = 0
        self.total = 0
        self.reports: list[dict[str, Any]] = []

    def good(self) -> None:
        """Record a step with finite losses."""
        self.in_a_row = 0
        self.reports.clear()

    def bad(self, step: int, terms: LossTerms | None, batches: Sequence[Batch], locally: bool) -> None:
        """Record a skipped step.

        Args:
            step: global step.
            terms: losses of this rank's (only) batch; None when the gradients are to blame.
            batches: this rank's batch, or all batches that the gradients come from.
            locally: whether this rank saw the non-finite value (all ranks skip together).
        Raises:
            NumericError: more than ``max_skips`` in a row.
        """
        self.in_a_row += 1
        self.total += 1
        if not locally:
            found: dict[str, Any] = {"another rank": {"value": "non-finite", "utterances": []}}
        elif terms is None:
            found = {"gradient": {"value": "non-finite", "utterances": [i for batch in batches for i in batch.ids]}}
        else:
            found = describe_non_finite(terms, batches[0])
        self.reports.append({"step": step, "terms": found, "batches": [batch_shapes(batch) for batch in batches]})
        named = "; ".join(
            f"{name} is {x['value']}" + (f" in {', '.join(x['utterances'][:5])}" if x["utterances"] else "")
            for name, x in found.items()
        )
        if locally:
            logger.warning("step %d skipped (%d in a row): %s", step, self.in_a_row, named)
        if self.in_a_row > self.max_skips:
            file = self.exp_dir / f"nonfinite-step{step}-rank{self.rank}.json"
            write_json(file, {"step": step, "in_a_row": self.in_a_row, "skipped": self.reports})
            error = NumericError(
                f"{self.in_a_row} steps in a row were not finite, the last at step {step}: {named}; all of them are in "
                f"{file}; look at these utterances, lower --base-lr, or use --precision bf16 instead of fp16"
            )
            error.elsewhere = not locally
            raise error


def constant_metrics(history: Sequence[dict[str, float]]) -> list[str]:
    """Return the validation metrics that two epochs in a row left exactly equal, and warn about them."""
    if len(history) < 2:
        return []
    before, now = history[-2], history[-1]
    same = [name for name, value in now.items() if before.get(name) == value and not _may_stay(name, value)]
    if same:
        logger.warning(
            "validation %s did not change over two epochs: is the model trained at all (learning rate, frozen "
            "parameters, skipped steps)?",
            ", ".join(f"{name}={now[name]:.6g}" for name in same),
        )
    return same


def _may_stay(name: str, value: float) -> bool:
    """Return whether a metric may repeat by chance or for good: a bound, a rate of a few utterances, a loss of 0."""
    return name.endswith(("bound", "acc")) or value in (0.0, 1.0)
