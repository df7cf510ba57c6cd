"""The main functions behind every recipe's train.py and decode.py."""

import json
import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from lhotse import CutSet

from icefall_kd.cli import config_from_dict, parse_config
from icefall_kd.config import DecodeConfig, TrainConfig
from icefall_kd.data.batch import Batch
from icefall_kd.data.datamodule import DataModule, decoding_batches, load_cuts
from icefall_kd.data.recordings import cuts_from_folder
from icefall_kd.data.streamed import SharDataModule
from icefall_kd.decode.runner import decode_parts
from icefall_kd.errors import ConfigError
from icefall_kd.results import parts_by_name
from icefall_kd.runtime import dist
from icefall_kd.runtime.env import pick_device
from icefall_kd.runtime.files import read_record, write_text
from icefall_kd.runtime.log import setup_logging
from icefall_kd.systems import build_system
from icefall_kd.systems.base import TRAINING_ONLY, System
from icefall_kd.text.tokenizer import Tokenizer
from icefall_kd.train.average import load_for_decoding, load_weights
from icefall_kd.train.checkpoint import load_model
from icefall_kd.train.loop import train

logger = logging.getLogger(__name__)


def train_main(argv: list[str] | None = None) -> int:
    """Train a system; run the same command again to resume."""
    config = parse_config(TrainConfig, argv, prog="train.py", description=train_main.__doc__)
    if config.loop.num_threads:
        torch.set_num_threads(config.loop.num_threads)
    dist.init(config.loop.dist_timeout)
    try:
        setup_logging(config.loop.exp_dir, "train", rank=dist.get_rank())
        # Training on audio alone has no tokens: it neither reads --lang-dir nor saves a tokenizer.
        tokenizer = None if config.self_supervised else Tokenizer.load(config.data.lang_dir)
        torch.manual_seed(config.loop.seed)
        system = build_system(config, tokenizer.vocab_size if tokenizer else 0)
        data = (DataModule if config.data.shar_dir is None else SharDataModule)(
            config.data,
            config.augment,
            tokenizer,
            label_specs=system.label_specs,
            min_coverage=config.kd.min_coverage,
            text_alignment=config.text_kd.text_alignment,
            with_audio=system.needs_audio,
            own_audio=system.hears_samples,
            own_labels=system.learns_labels,
            **system.alignment_losses,
            crop_duration=config.ssl.crop_duration if config.self_supervised else None,
            seed=config.loop.seed,
        )
        # Only once the loop has agreed to start: a refused command must not change the tokenizer of an exp_dir.
        train(
            system,
            data,
            config,
            tokenizer_hash=tokenizer.hash if tokenizer else "",
            on_start=lambda: _furnish(config.loop.exp_dir, tokenizer, data),
            epoch_seconds=data.train_seconds,
        )
    finally:
        dist.shutdown()
    return 0


def _furnish(exp_dir: Path, tokenizer: Tokenizer | None, data: DataModule) -> None:
    """Write the tokenizer, if there is one, and the list of utterances that the filters left out.

    What is there stays, unless it was cut off.
    """
    if tokenizer is not None and not tokenizer.is_saved_in(exp_dir / "tokenizer"):
        tokenizer.save(exp_dir / "tokenizer")
    lines = "".join(json.dumps(asdict(x), ensure_ascii=False) + "\n" for x in data.rejected)
    file = exp_dir / "left_out.jsonl"
    if not file.exists() or file.read_bytes() != lines.encode():
        write_text(file, lines)


def decode_main(argv: list[str] | None = None) -> int:
    """Decode test sets, score them and print error rates with confidence intervals."""
    decode(parse_config(DecodeConfig, argv, prog="decode.py", description=decode_main.__doc__))
    return 0


@dataclass(frozen=True)
class Trained:
    """A trained system, ready to recognise."""

    system: System
    """In evaluation mode, on the device, without distillation heads."""
    tokenizer: Tokenizer
    config: TrainConfig
    """Options of the training."""
    files_used: str
    """Which checkpoint files the parameters come from."""


def load_system(config: DecodeConfig) -> Trained:
    """Load the parameters that the options name from an exp_dir, and give the encoder the chunks that they name.

    Raises:
        ConfigError: there is no such exp_dir, or its model cannot be run with these chunks.
        DataError: no readable checkpoint, or one of another tokenizer.
    """
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    if not config.exp_dir.is_dir():
        raise ConfigError(f"--exp-dir {config.exp_dir} does not exist; train first")
    _refuse_self_supervised(config.exp_dir)
    tokenizer = Tokenizer.load(config.exp_dir / "tokenizer")
    if config.weights is not None:
        state_dict, saved, used = load_weights(config.weights, tokenizer.hash)
    else:
        state_dict, saved, used = load_for_decoding(
            config.exp_dir, config.epoch, config.iter, config.avg, config.use_averaged_model, tokenizer.hash
        )
    logger.info("parameters from %s", used)
    train_config = config_from_dict(TrainConfig, saved, str(config.exp_dir))
    system = build_system(train_config, tokenizer.vocab_size, inference=True)
    # Distillation heads and the like are of no use here; anything else must fit.
    kept = {name: tensor for name, tensor in state_dict.items() if not name.startswith(TRAINING_ONLY)}
    load_model(system, kept, source=f"{config.exp_dir} ({used})")
    system.set_up_decoding(config, train_config.model)
    system.to(pick_device(config.device)).eval()
    return Trained(system, tokenizer, train_config, used)


def _refuse_self_supervised(exp_dir: Path) -> None:
    file = exp_dir / "config.json"
    objective = read_record(file, config=dict)["config"].get("objective", "asr") if file.exists() else "asr"
    if objective != "asr":
        raise ConfigError(
            f"--exp-dir {exp_dir} holds a training without transcripts (--objective {objective}), which recognises "
            "nothing; fine-tune it with train.py --objective asr --init-from it, and decode that"
        )


def decode(config: DecodeConfig) -> dict[str, dict]:
    """Decode and score the test sets of ``config``; return the results of each by its name."""
    if config.exp_dir.is_dir():
        setup_logging(config.exp_dir, f"decode-{config.decoding_method}")
    trained = load_system(config)
    system, tokenizer, used = trained.system, trained.tokenizer, trained.files_used
    batches = {
        name: part_batches(
            config.manifest_dir, part, tokenizer, config.max_duration, config.tail_padding, system.hears_samples
        )
        for name, part in list(parts_by_name(config.test_parts).items())[config.shard :: config.num_shards]
    }
    return decode_parts(system, tokenizer, batches, config, files_used=used)


def part_cuts(manifest_dir: Path, part: str) -> CutSet:
    """Return the cuts of a part: a name in ``manifest_dir``, a cut set's path, or a folder with *.trans.txt."""
    if Path(part).is_dir():
        return cuts_from_folder(Path(part))
    return load_cuts(manifest_dir, [part])


def part_batches(
    manifest_dir: Path,
    part: str,
    tokenizer: Tokenizer,
    max_duration: float,
    tail_padding: float = 0.0,
    with_audio: bool = False,
) -> Iterable[Batch]:
    """Return the batches of a part to decode, with stored features where all of its cuts have them."""
    cuts = part_cuts(manifest_dir, part)
    features = "precomputed" if all(c.has_features for c in cuts) else "on_the_fly"
    return decoding_batches(
        cuts,
        tokenizer,
        max_duration=max_duration,
        features=features,
        tail_padding=tail_padding,
        with_audio=with_audio,
    )
