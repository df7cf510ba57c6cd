"""Parameters that a training takes from another one before its first step (--init-from).

Gong et al. 2022 (arXiv 2207.10600) start a student of its teacher's size from the teacher's encoder.  That the CTC head
goes with it, and what a shallower student takes, is our design.
"""

import logging
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from icefall_kd.config import TransferConfig
from icefall_kd.errors import ConfigError
from icefall_kd.systems.base import TRAINING_ONLY, System
from icefall_kd.train.average import load_trained, trained_tokenizer
from icefall_kd.train.checkpoint import LoadReport, load_model, state_sha256

logger = logging.getLogger(__name__)

# Parameters of each part that --init-modules can name.
MODULES = {"encoder": "model.encoder.", "ctc": "model.ctc_output.", "decoder": "model.decoder."}
_LAYER = re.compile(r"layers\.(\d+)\.")
# Norms of their own for each mode (models/dual.py) beside a norm of one mode.
_NORM_OF_MODE = re.compile(r"\.(full|streaming)(?=\.(weight|bias)$)")


@dataclass(frozen=True)
class TransferReport(LoadReport):
    """What became of every tensor of either side."""

    skipped: list[str] = field(default_factory=list)
    """Entries that the options leave out."""

    def lines(self) -> list[str]:
        """Return the number of loaded tensors, and a line for every other one."""
        return [*super().lines(), *(f"skipped: {name}" for name in self.skipped)]

    def counts(self) -> dict[str, int]:
        """Return how many tensors there are of each kind."""
        return {name: len(names) for name, names in asdict(self).items()}


def initialise(
    system: System, exp_dir: Path, transfer: TransferConfig | None = None, tokenizer_hash: str = ""
) -> tuple[dict[str, Any], TransferReport]:
    """Give ``system`` the parameters of another training that the options name and that have its shapes.

    Every tensor that is not loaded is logged.

    Args:
        system: receives them.
        exp_dir: the other training; its newest weights, averaged where it kept averages.
        transfer: which parts and layers; None: whatever has an equal name and shape.
        tokenizer_hash: of this training's tokens.
    Returns:
        What is recorded of it (exp_dir, the files, their SHA-256, counts of tensors), and the whole report.
    Raises:
        ConfigError: the folder holds no training, nothing matches, a named layer does not exist, or the other training
            has other tokens and more than its encoder would be taken.
        DataError: a checkpoint is damaged.
    """
    transfer = transfer or TransferConfig()
    if not exp_dir.is_dir():
        raise ConfigError(f"--init-from {exp_dir} is no folder; name the exp_dir of a training")
    weights, options, used = load_trained(exp_dir)
    names = _renamed(list(weights), transfer, exp_dir)
    chosen = {new: weights[old] for old, new in names.items() if new is not None}
    if options.get("attention_decoder") == "ar":
        chosen |= _mask_embedding(system, chosen)
    olds = {new: old for old, new in names.items() if new is not None}
    chosen, olds = _norms_of_modes(system, chosen, olds)
    report = load_model(system, chosen, strict=False)
    if not report.loaded:
        raise ConfigError(
            f"--init-from {exp_dir} ({used}): no tensor has a name and shape of this model ({report}); name the "
            "training of a model that shares some, or leave it out"
        )
    _refuse_other_tokens(report.loaded, exp_dir, tokenizer_hash)
    result = TransferReport(
        **asdict(report) | {"loaded": [n if olds[n] == n else f"{n} <- {olds[n]}" for n in report.loaded]},
        skipped=[old for old, new in names.items() if new is None],
    )
    for line in result.lines():
        logger.info("--init-from %s: %s", exp_dir, line)
    record = {"exp_dir": str(exp_dir), "weights": used, "weights_sha256": state_sha256(weights)}
    return {**record, **result.counts()}, result


def _renamed(names: list[str], transfer: TransferConfig, exp_dir: Path) -> dict[str, str | None]:
    """Return the name that each tensor gets in this model; None: the options leave it out."""
    layers = {"encoder": transfer.init_encoder_layers, "decoder": transfer.init_decoder_layers}
    for part, chosen in layers.items():
        there = {int(m[1]) + 1 for n in names if n.startswith(MODULES[part]) and (m := _LAYER.search(n))}
        if chosen is not None and (unknown := sorted(set(chosen) - there)):
            raise ConfigError(
                f"--init-{part}-layers names layer {unknown[0]}; the {part} of {exp_dir} has {len(there)} layers"
            )
    found: dict[str, str | None] = {}
    for name in names:
        part = next((p for p, prefix in MODULES.items() if name.startswith(prefix)), None)
        wanted = transfer.init_modules is None or part in transfer.init_modules
        found[name] = name if wanted else None
        chosen, layer = layers.get(part), _LAYER.search(name)
        if wanted and chosen is not None and layer:
            number = int(layer[1]) + 1
            place = f"layers.{chosen.index(number)}." if number in chosen else None
            found[name] = name[: layer.start()] + place + name[layer.end() :] if place else None
    return found


def _norms_of_modes(
    system: System, chosen: dict[str, Tensor], olds: dict[str, str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the weights with the norms of this model's modes, and what each is called in the other training.

    Both norms of a dual-mode encoder start from the one of a single mode; a single mode starts from its own of the two.
    """
    found, names = dict(chosen), dict(olds)
    for name in (name for name in system.state_dict() if name not in chosen):
        single = _NORM_OF_MODE.sub("", name)
        old = single if single != name else re.sub(r"\.(weight|bias)$", rf".{system.norm_mode}.\1", name)
        if old in chosen:
            found[name], names[name] = chosen[old], olds[old]
    taken = {names[n] for n in found if n not in chosen}
    used = {n: t for n, t in found.items() if n not in chosen or olds[n] not in taken}
    return {n: t for n, t in used.items() if not n.endswith("mask_step")}, names


def _mask_embedding(system: System, chosen: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the decoder's embeddings with a mask that a left-to-right teacher never used: the mean of all others."""
    name = f"{MODULES['decoder']}embedding.weight"
    model = getattr(system, "model", None)
    if name not in chosen or getattr(getattr(model, "decoder", None), "causal", True):
        return {}
    if chosen[name].shape != model.decoder.embedding.weight.shape:  # which is reported, or refused, later
        return {}
    embedding = chosen[name].clone()
    embedding[model.mask_id] = embedding[: model.mask_id].mean(dim=0)
    return {name: embedding}


def _refuse_other_tokens(loaded: list[str], exp_dir: Path, tokenizer_hash: str) -> None:
    theirs = trained_tokenizer(exp_dir)
    beyond = [name for name in loaded if not name.startswith((MODULES["encoder"], *TRAINING_ONLY))]
    if beyond and theirs and tokenizer_hash and theirs != tokenizer_hash:
        raise ConfigError(
            f"--init-from {exp_dir} was trained with tokenizer {theirs}, this training has {tokenizer_hash}: its "
            f"{beyond[0]} speaks of other tokens; use its lang dir, or take --init-modules encoder alone"
        )
