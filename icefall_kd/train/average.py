"""Averages of models: running during training, of checkpoints and between two running averages afterwards."""

import copy
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from icefall_kd.errors import ConfigError, DataError
from icefall_kd.models.block_storage import unpack_layers
from icefall_kd.runtime.files import fingerprint, reading
from icefall_kd.runtime.tensors import read_tensors, write_tensors
from icefall_kd.train.checkpoint import list_checkpoints, load_checkpoint, state_sha256

logger = logging.getLogger(__name__)

# Why checkpoints of a pruned model are not averaged.
_MASKS_REMEDY = (
    "the mean of weights that were trained under several masks is no network that was trained; take a range behind "
    "--mask-freeze-step, or one checkpoint with --use-averaged-model false"
)


class RunningAverage:
    """The mean in float64 of the parameters at every ``period``-th step since the first.

    Args:
        model: whose parameters and buffers are averaged; integer ones are copied.
        period: steps between two samples.
    """

    def __init__(self, model: nn.Module, period: int) -> None:
        self.period = period
        self.state = {name: _as_double(t).clone() for name, t in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> bool:
        """Take a sample when ``step`` (steps done, from 1) is a multiple of the period; return whether it was."""
        if step % self.period:
            return False
        weight = self.period / step
        for name, tensor in model.state_dict().items():
            average = self.state[name]
            if tensor.is_floating_point():
                average.mul_(1.0 - weight).add_(tensor.double(), alpha=weight)
            else:
                average.copy_(tensor)
        return True

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages by name."""
        return dict(self.state)

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Restore the averages of :meth:`state_dict`."""
        if state_dict.keys() != self.state.keys():
            names = sorted(state_dict.keys() ^ self.state.keys())
            raise ConfigError(f"the saved average and the model differ in {', '.join(names[:5])}")
        for name, tensor in self.state.items():
            tensor.copy_(state_dict[name])


def _as_double(tensor: Tensor) -> Tensor:
    return tensor.detach().double() if tensor.is_floating_point() else tensor.detach()


def average_checkpoints(files: Sequence[str | Path]) -> dict[str, Tensor]:
    """Return the arithmetic mean of the models of ``files``; integers are taken from the last file.

    Raises:
        ConfigError: nothing to average, other models, or masks that differ.
    """
    if not files:
        raise ConfigError("there is nothing to average: no files were given")
    total: dict[str, Tensor] = {}
    for path in files:
        model = load_checkpoint(path, mmap=True)["model"]
        if total and total.keys() != model.keys():
            names = sorted(total.keys() ^ model.keys())
            raise ConfigError(f"{path} holds another model than {files[0]}: they differ in {', '.join(names[:5])}")
        for name, tensor in model.items():
            if tensor.is_floating_point():
                total[name] = total[name].add_(tensor) if name in total else tensor.double()
            elif tensor.dtype == torch.bool and name in total and not torch.equal(total[name], tensor):
                raise ConfigError(f"{files[0]} and {path} have different masks ({name}): {_MASKS_REMEDY}")
            else:
                total[name] = tensor.clone()
    last = load_checkpoint(files[-1], mmap=True, verify=False)["model"]
    return {
        name: (t / len(files)).to(last[name].dtype) if t.is_floating_point() else t for name, t in total.items()
    }


def average_from_averaged(start: str | Path | None, end: str | Path) -> dict[str, Tensor]:
    """Return the mean of all parameters sampled after checkpoint ``start`` up to checkpoint ``end``.

    With running means a_s of b_s steps and a_e of b_e steps it is ``(b_e a_e - b_s a_s) / (b_e - b_s)``, all
    steps rounded down to the average period.

    Args:
        start: the checkpoint before the range; None: the range starts with the training.
        end: the last checkpoint of the range.
    Raises:
        ConfigError: no sample lies between the two, naming both step counts; or masks changed there.
    """
    last = load_checkpoint(end, mmap=True)
    period = _period(last, end)
    end_step = last["train"]["step"] // period * period
    first, start_step = None, 0
    if start is not None:
        first = load_checkpoint(start, mmap=True)
        if _period(first, start) != period:
            raise ConfigError(f"{start} was averaged every {_period(first, start)} steps, {end} every {period}")
        start_step = first["train"]["step"] // period * period
    if end_step <= start_step:
        begin = "the start" if first is None else f"{start} (step {first['train']['step']})"
        raise ConfigError(
            f"no average lies between {begin} and {end} (step {last['train']['step']}): the model was averaged every "
            f"{period} steps; take a longer range, --use-averaged-model false, or train with a smaller --average-period"
        )
    changed = max((int(t) for name, t in last["model"].items() if name.endswith("mask_step")), default=0)
    begin_step = first["train"]["step"] if first is not None else 0
    if changed > begin_step:
        raise ConfigError(f"the masks of {end} changed at step {changed}, behind step {begin_step}: {_MASKS_REMEDY}")
    weight = end_step / (end_step - start_step)
    averages = {}
    for name, tensor in last["model_avg"].items():
        if tensor.is_floating_point():
            mean = tensor.double() * weight
            if first is not None and start_step > 0:
                mean += first["model_avg"][name].double() * (1.0 - weight)
            averages[name] = mean.to(last["model"][name].dtype)
        else:
            averages[name] = tensor.clone()
    return averages


def _period(checkpoint: dict[str, Any], path: str | Path) -> int:
    if not checkpoint.get("model_avg"):
        raise ConfigError(f"{path} holds no averaged model; use --use-averaged-model false")
    return checkpoint["train"]["average_period"]


def best_n(exp_dir: str | Path, n: int, metric: str = "valid_loss") -> list[Path]:
    """Return the ``n`` epoch files with the lowest validation ``metric``, best first.

    Args:
        exp_dir: folder of epoch-N.pt.
        n: how many.
        metric: a name among the validation results of the checkpoints ("valid_loss", "valid_ctc_loss", ...), or
            "train_loss".
    Raises:
        ConfigError: too few files, or the metric is unknown (the known ones are named).
    """
    scored = []
    for epoch, path in list_checkpoints(exp_dir, "epoch").items():
        counters = load_checkpoint(path, mmap=True, verify=False)["train"]
        results = {f"valid_{name}": value for name, value in (counters.get("valid") or {}).items()}
        if counters.get("train_loss") is not None:
            results["train_loss"] = counters["train_loss"]
        if metric not in results:
            raise ConfigError(f"{path} has no metric {metric!r}; it has {', '.join(sorted(results)) or 'none'}")
        scored.append((results[metric], epoch, path))
    if not 1 <= n <= len(scored):
        raise ConfigError(f"cannot take the best {n} of the {len(scored)} epoch files in {exp_dir}")
    # NaN compares with nothing; it is never among the best while there is a number.
    return [path for _, _, path in sorted(scored, key=lambda x: (math.isnan(x[0]), x[0], x[1]))[:n]]


def last_n(exp_dir: str | Path, n: int, kind: str = "epoch", end: int | None = None) -> list[Path]:
    """Return the ``n`` files of ``kind`` up to number ``end`` (None: the newest), oldest first.

    Raises:
        ConfigError: the files do not exist; the existing numbers are named.
    """
    files = list_checkpoints(exp_dir, kind)
    if not files:
        raise ConfigError(f"{exp_dir} holds no {kind}-N.pt")
    end = max(files) if end is None else end
    if end not in files:
        raise ConfigError(f"{exp_dir} holds no {kind}-{end}.pt; there are {_numbers(files)}")
    wanted = list(range(end - n + 1, end + 1)) if kind == "epoch" else [i for i in files if i <= end][-n:]
    missing = [i for i in wanted if i not in files]
    if n < 1 or missing or len(wanted) < n:
        lacking = f"{kind}-{missing[0]}.pt is not there" if missing else f"only {len(wanted)} files end there"
        raise ConfigError(f"cannot average {n} files up to {kind}-{end}.pt: {lacking}; there are {_numbers(files)}")
    return [files[i] for i in wanted]


def _numbers(files: dict[int, Path]) -> str:
    return ", ".join(str(i) for i in files)


def load_for_decoding(
    exp_dir: str | Path,
    epoch: int | None = None,
    iter: int | None = None,
    avg: int = 1,
    use_averaged_model: bool = True,
    tokenizer_hash: str | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """Return the weights to decode with.

    Args:
        exp_dir: folder of the training.
        epoch: last epoch of the range; None (and no ``iter``): the newest file.
        iter: take checkpoint-``iter``.pt as the end instead, and count ``avg`` in checkpoint files.
        avg: epochs (or checkpoints) averaged.
        use_averaged_model: all steps of the range, from the running averages of its two ends; else the
            arithmetic mean of the files.
        tokenizer_hash: of the tokenizer that will decode; None: not checked.
    Returns:
        (state dict, configuration of the training as a flat dict, description of the files used).
    Raises:
        ConfigError: the range is impossible, and why; or the training had another tokenizer.
    """
    if epoch is not None and iter is not None:
        raise ConfigError(f"--epoch {epoch} and --iter {iter} exclude each other")
    if avg < 1:
        raise ConfigError(f"--avg is {avg}; it must be at least 1")
    kind, end = ("checkpoint", iter) if iter is not None else ("epoch", epoch)
    if end is None and not list_checkpoints(exp_dir, "epoch"):
        kind = "checkpoint"
    with reading(f"a checkpoint of {exp_dir}", "copy it again or delete it"):
        if not use_averaged_model:
            files = last_n(exp_dir, avg, kind, end)
            config = _config(files[-1], tokenizer_hash)
            state_dict = average_checkpoints(files)
            used = f"mean of {', '.join(f.name for f in files)}" if len(files) > 1 else files[0].name
            return state_dict, config, used
        start, last = range_ends(exp_dir, kind, end, avg)
        config = _config(last, tokenizer_hash)
        state_dict = average_from_averaged(start, last)
        used = f"average of all steps after {start.name if start else 'the start'} up to {last.name}"
        return state_dict, config, used


def load_trained(
    exp_dir: str | Path, tokenizer_hash: str | None = None
) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """Return the newest weights of a training, averaged over its last epoch where it kept averages.

    Those of a training that is in its first epoch, or has one alone, are taken as they are: the mean of all its steps
    would hold what was drawn at random, and parts that its first stage has frozen.

    Returns and raises as :func:`load_for_decoding`.
    """
    try:
        if range_ends(exp_dir, "epoch" if list_checkpoints(exp_dir, "epoch") else "checkpoint", None, 1)[0] is not None:
            return load_for_decoding(exp_dir, tokenizer_hash=tokenizer_hash)
        logger.info("%s: there is no epoch before the newest weights; they are taken as they are", exp_dir)
    except ConfigError as error:
        logger.warning("%s: %s; the newest parameters are taken as they are", exp_dir, error)
    return load_for_decoding(exp_dir, use_averaged_model=False, tokenizer_hash=tokenizer_hash)


def trained_tokenizer(exp_dir: str | Path) -> str:
    """Return the hash of the tokenizer that the newest checkpoint of a training knows; empty: none is recorded."""
    kind = "epoch" if list_checkpoints(exp_dir, "epoch") else "checkpoint"
    return load_checkpoint(last_n(exp_dir, 1, kind)[-1], mmap=True, verify=False).get("tokenizer_hash", "")


def _config(path: Path, tokenizer_hash: str | None) -> dict[str, Any]:
    """Return the configuration in a checkpoint, unless it was trained with another tokenizer."""
    checkpoint = load_checkpoint(path, mmap=True, verify=False)
    _check_hash(path, checkpoint.get("tokenizer_hash", ""), tokenizer_hash)
    return checkpoint["config"]


def _check_hash(path: Path, saved: str, tokenizer_hash: str | None) -> None:
    if saved and tokenizer_hash and saved != tokenizer_hash:
        raise ConfigError(
            f"{path} was trained with tokenizer {saved}, the one to decode with is {tokenizer_hash}; "
            f"put the lang dir of the training back into {path.parent / 'tokenizer'}"
        )


def range_ends(exp_dir: str | Path, kind: str, end: int | None, avg: int) -> tuple[Path | None, Path]:
    """Return the file before the range of ``avg`` files (None: it starts at step 0) and the last file of the range.

    Args:
        exp_dir: folder of the files.
        kind: "epoch" or "checkpoint".
        end: number of the last file; None: the newest.
        avg: epochs or checkpoints of the range.
    Raises:
        ConfigError: a file is not there, or the range starts before the training.
    """
    last = last_n(exp_dir, 1, kind, end)[0]
    files = list_checkpoints(exp_dir, kind)
    end = next(number for number, path in files.items() if path == last)
    if kind == "epoch":
        start = end - avg
        if start < 0:
            raise ConfigError(f"--avg {avg} epochs do not end in epoch {end}: --avg can be at most {end} there")
        if start > 0 and start not in files:
            raise ConfigError(
                f"--epoch {end} --avg {avg} with --use-averaged-model needs epoch-{start}.pt, which is not in "
                f"{exp_dir}; there are {_numbers(files)}"
            )
        return files.get(start), last
    earlier = [number for number in files if number < end]
    if avg == 1 and not earlier:
        return None, last
    if len(earlier) < avg:
        raise ConfigError(
            f"--iter {end} --avg {avg} with --use-averaged-model needs {avg} checkpoints before it, {exp_dir} has "
            f"{len(earlier)}"
        )
    return files[earlier[-avg]], last


def averaged_checkpoint(source: str | Path, state_dict: dict[str, Tensor]) -> dict[str, Any]:
    """Return a checkpoint with ``state_dict`` as its model and the configuration of ``source``, to save and decode."""
    checkpoint = load_checkpoint(source)
    kept = {name: copy.copy(checkpoint[name]) for name in ("config", "tokenizer_hash", "train")}
    return {**kept, "model": state_dict}


def save_weights(path: Path, checkpoint: dict[str, Any], blocks: dict | None = None) -> None:
    """Write the model of an averaged checkpoint as safetensors, which every version of torch reads.

    torch 1.13, with which k2's last wheel on PyPI comes, reads no checkpoint of a later one without running its code.

    Args:
        path: the file.
        checkpoint: model, config and tokenizer_hash.
        blocks: the model is that of models/block_storage.py pack_layers, and this what it says about it.
    """
    about = {name: checkpoint[name] for name in ("config", "tokenizer_hash")}
    about |= {"blocks": blocks} if blocks is not None else {}
    about["sha256"] = _weights_sha256(about, checkpoint["model"])
    write_tensors(path, checkpoint["model"], {"checkpoint": json.dumps(about)})


def load_weights(path: Path, tokenizer_hash: str) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """Read what :func:`save_weights` wrote; returns and raises as :func:`load_for_decoding`."""
    metadata, state_dict = read_tensors(path)
    try:
        about = json.loads(metadata["checkpoint"])
        config, saved = about["config"], about["tokenizer_hash"]
        if not isinstance(config, dict) or not isinstance(saved, str):
            raise ValueError(f"config is a {type(config).__name__}, tokenizer_hash a {type(saved).__name__}")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise DataError(
            f"{path} is not from local/average.py --out FILE.safetensors or local/export.py --mode ({error!r})"
        ) from error
    digest = about.pop("sha256", None)  # files before this version have none
    if digest is not None and digest != _weights_sha256(about, state_dict):
        raise DataError(f"{path} is not as it was written (its checksum differs); copy or write it again")
    if "blocks" in about:
        with reading(str(path), "copy or write it again"):
            try:
                state_dict = unpack_layers(state_dict, about["blocks"])
            except DataError as error:
                raise DataError(f"{path} is damaged ({error}); copy or write it again") from error
    _check_hash(path, saved, tokenizer_hash)
    return state_dict, config, path.name


def _weights_sha256(about: dict, tensors: dict[str, Tensor]) -> str:
    return fingerprint([json.dumps(about, sort_keys=True), state_sha256(tensors)])
