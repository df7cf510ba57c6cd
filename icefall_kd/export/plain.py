"""The plain recognisers in a training of --system dualmode: one mode, one norm, no masks.

"dense" hears whole utterances with all weights; "streaming" hears chunks with all weights, of trainings without masks;
"sparse" hears chunks with W . M, and is stored by blocks (models/block_storage.py).  Our design.
"""

import dataclasses
import logging
from pathlib import Path

import torch
from torch import Tensor, nn

from icefall_kd.cli import config_to_dict
from icefall_kd.config import DecodeConfig, DualConfig, ExportConfig
from icefall_kd.errors import ConfigError, NumericError
from icefall_kd.export.check import check_encoder
from icefall_kd.models.block_storage import pack_layers
from icefall_kd.models.dual import DualNorm, encoder_mode
from icefall_kd.models.pruning import PrunableLinear, actual_sparsity, prunable_layers, sparse_size
from icefall_kd.recipe import Trained, load_system
from icefall_kd.systems import build_system
from icefall_kd.train.average import last_n, save_weights
from icefall_kd.train.checkpoint import list_checkpoints, load_checkpoint, load_model

logger = logging.getLogger(__name__)

MODEL = "model.safetensors"
FP16_MODEL = "model.fp16.safetensors"


def check_mode(trained: Trained, config: ExportConfig) -> None:
    """Raise a ConfigError where --mode is missing or names what the training does not hold."""
    if trained.config.system != "dualmode":
        if config.mode != "auto":
            raise ConfigError(f"--mode {config.mode}: {config.exp_dir} is not of --system dualmode; leave --mode out")
        return
    cfg = trained.config.dual
    offered = ["dense"] if cfg.modes != "streaming" else []
    if cfg.modes != "full":
        offered.append("sparse" if cfg.sparsity > 0 else "streaming")
    if config.mode not in offered:
        given = "without --mode" if config.mode == "auto" else f"--mode {config.mode}"
        raise ConfigError(
            f"{given}: {config.exp_dir} was trained with --modes {cfg.modes} and --sparsity {cfg.sparsity}, of which "
            f"{' and '.join(f'--mode {name}' for name in offered)} can be exported; a training with --modes dual and "
            "a --sparsity above 0 offers dense and sparse"
        )
    if config.mode == "sparse" and all(bool(x.mask.all()) for x in prunable_layers(trained.system).values()):
        raise ConfigError(
            f"--mode sparse: the masks of {config.exp_dir} ({trained.files_used}) keep every weight, since pruning "
            f"begins behind --prune-begin-step {cfg.prune_begin_step}; take a later checkpoint"
        )


def mask_facts(trained: Trained, config: ExportConfig) -> dict:
    """Return sparsity, the step of the masks and whether they were frozen; warn of masks that were not."""
    model = trained.system.model
    step, frozen = int(model.encoder.mask_step), _are_frozen(trained, config)
    masks = {name: layer.mask for name, layer in prunable_layers(model).items()}
    each, kept = actual_sparsity(masks), sum(int(mask.sum()) for mask in masks.values())
    sparsity = 1 - kept / sum(mask.numel() for mask in masks.values())
    if not frozen:
        logger.warning(
            "the masks of %s were drawn at step %d and not frozen (--mask-freeze-step): the sparse model is that of "
            "one checkpoint, with %.1f %% of its prunable weights masked of the %.1f %% of --sparsity",
            trained.files_used, step, 100 * sparsity, 100 * trained.config.dual.sparsity,
        )  # fmt: skip
    return {"step": step, "frozen": frozen, "sparsity": sparsity,
            "lowest": min(each.values()), "highest": max(each.values())}  # fmt: skip


def _are_frozen(trained: Trained, config: ExportConfig) -> bool:
    """Return whether the last checkpoint that is exported has masks that stay."""
    frozen_at, loop = trained.config.dual.mask_freeze_step, trained.config.loop
    if frozen_at is None:
        return False
    kind, end = ("checkpoint", config.iter) if config.iter is not None else ("epoch", config.epoch)
    if end is None and not list_checkpoints(config.exp_dir, "epoch"):
        kind = "checkpoint"
    train = load_checkpoint(last_n(config.exp_dir, 1, kind, end)[-1], mmap=True, verify=False)["train"]
    if 0 < frozen_at < 1:  # a share of the planned steps: epochs as long as the first one
        if not train["history"]:
            return False
        planned = loop.num_epochs * train["history"][0]["step"]
        frozen_at *= planned if loop.max_steps is None else min(planned, loop.max_steps)
    return train["step"] >= frozen_at


def plain_state(model: nn.Module, sparse: bool) -> dict[str, Tensor]:
    """Return the state dict of one mode of a model, with the names that it has in a model of that mode alone.

    Args:
        model: whose norms are in the mode that is wanted.
        sparse: zeros in place of masked weights.
    """
    state = {name: x.detach() for name, x in model.state_dict().items() if not name.endswith("encoder.mask_step")}
    for name, module in model.named_modules():
        if isinstance(module, PrunableLinear):
            del state[f"{name}.mask"]
            if sparse:
                state[f"{name}.weight"] = module.weight.detach() * module.mask
        elif isinstance(module, DualNorm):
            for key in ("weight", "bias"):
                del state[f"{name}.full.{key}"], state[f"{name}.streaming.{key}"]
                state[f"{name}.{key}"] = getattr(module.active, key).detach()
    return state


def plain(trained: Trained, mode: str) -> Trained:
    """Return one mode of a dual training as a training of that mode alone, which has no masks."""
    encoder_is = "full" if mode == "dense" else "streaming"
    config = dataclasses.replace(trained.config, dual=DualConfig(modes=encoder_is))
    system = build_system(config, trained.tokenizer.vocab_size, inference=True)
    with encoder_mode(trained.system.model.encoder, encoder_is, sparse=mode == "sparse"):
        load_model(system, plain_state(trained.system, sparse=mode == "sparse"), source=trained.files_used)
    system.set_up_decoding(DecodeConfig(), config.model)
    return Trained(system.eval().requires_grad_(False), trained.tokenizer, config, trained.files_used)


def write_plain(dual: Trained, one: Trained, config: ExportConfig, folder: Path) -> dict:
    """Write the model of one mode for :func:`icefall_kd.train.average.load_weights`, and check what was written.

    Args:
        dual: the training.
        one: its mode, of :func:`plain`.
        config: mode, and whether 16-bit weights are wanted, too.
        folder: receives the files, and the tokenizer in a folder of its own.
    Returns:
        files, checks and size for the record.
    Raises:
        NumericError: what was written differs from the model, in float32 by a single bit.
    """
    dual.tokenizer.save(folder / "tokenizer")
    files = {"fp32": {"model": MODEL}} | ({"fp16": {"model": FP16_MODEL}} if config.quantize == "fp16" else {})
    checks = {}
    block = dual.config.dual.prune_block
    for precision, names in files.items():
        path, state = folder / names["model"], one.system.state_dict()
        if precision == "fp16":
            state = {name: _half(name, x) for name, x in state.items()}
        blocks = None
        if config.mode == "sparse":
            state, blocks = pack_layers(state, prunable_layers(dual.system), block)
        about = {"config": config_to_dict(one.config), "tokenizer_hash": one.tokenizer.hash}
        save_weights(path, about | {"model": state}, blocks)
        checks[path.name] = _check(dual, one, config, path, exact=precision == "fp32")
        logger.info("%s: %.2f MB", path.name, path.stat().st_size / 1e6)
    size = sparse_size(dual.system, block)
    facts = {"prunable": size.prunable, "rest": size.rest, "parameters": size.prunable + size.rest}
    if config.mode == "sparse":
        facts |= {"nonzeros": size.nonzeros, "blocks": size.blocks, "block": list(block)}
    width = {"fp32": 4, "fp16": 2}
    count = size.sparse_bytes if config.mode == "sparse" else size.dense_bytes
    facts["bytes"] = {precision: int(count(width[precision])) for precision in files}
    return {"files": files, "checks": checks, "size": facts}


def _half(name: str, x: Tensor) -> Tensor:
    half = x.half()
    if not torch.isfinite(half).all():
        raise NumericError(f"{name} holds {x.abs().max():g}, beyond 16-bit floats (65504); leave --quantize fp16 out")
    return half


def _check(dual: Trained, one: Trained, config: ExportConfig, path: Path, exact: bool) -> dict[str, float]:
    """Load a file as decode.py does, and compare parameters and encoder outputs with those of the training."""
    found = load_system(DecodeConfig(exp_dir=path.parent, weights=path, device="cpu")).system
    stored = found.state_dict()
    for name, expected in one.system.state_dict().items():
        if not torch.equal(stored[name], expected if exact else expected.half().float()):
            raise NumericError(f"{name} in {path.name} is not that of the model; nothing was written")
    encoder, mode = dual.system.model.encoder, one.config.dual.modes
    with encoder_mode(encoder, mode, sparse=config.mode == "sparse"):
        return check_encoder(encoder, found.model.encoder, exact)
