"""Training of the small neural language model: epochs over sentences, exact resume at the end of each."""

import logging
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from icefall_kd.cli import config_to_dict
from icefall_kd.config import OptimConfig
from icefall_kd.errors import ConfigError, DataError, NumericError
from icefall_kd.models.lm import LmConfig, TokenLm, save_lm
from icefall_kd.runtime.env import pick_device
from icefall_kd.text.corpus import TextConfig, sentences, transcripts
from icefall_kd.text.tokenizer import Tokenizer
from icefall_kd.train.checkpoint import load_newest, remove_old, save_checkpoint
from icefall_kd.train.optim import build_optimizer, learning_rate, needs_plan

logger = logging.getLogger(__name__)

# Options that a resumed training may change.
_FREE = ("exp_dir", "num_epochs", "device", "num_threads")
# Nats a token; a model that says nothing has log V, about 10.  Beyond it the training is lost.
_LARGEST_LOSS = 100.0


@dataclass(frozen=True, kw_only=True)
class TrainLmConfig:
    """Train a small neural language model over tokens."""

    source: TextConfig
    lang_dir: Path
    """Folder of the tokenizer."""
    exp_dir: Path
    """Where lm.safetensors (what decode.py --lm takes) and the checkpoints lie."""
    valid_cuts: list[Path] = field(default_factory=list)
    """Cut sets whose transcripts choose the epoch; none: the last epoch is kept."""
    num_epochs: int = 20
    """Epochs to train."""
    batch_tokens: int = 4000
    """Padded tokens a batch."""
    seed: int = 42
    """Seed of initialisation, order and dropout."""
    device: str = "auto"
    """auto: the GPU when there is one."""
    num_threads: int | None = None
    """torch threads on a CPU; None: torch's own choice."""
    model: LmConfig = LmConfig()
    optim: OptimConfig = OptimConfig(optimizer="adamw", base_lr=0.002, lr_warmup_steps=100)

    def __post_init__(self) -> None:
        if self.num_epochs < 1 or self.batch_tokens < 1:
            raise ConfigError("--num-epochs and --batch-tokens must be at least 1")
        if self.optim.optimizer != "adamw":
            raise ConfigError("a language model is trained with --optimizer adamw")


def epoch_batches(lengths: list[int], batch_tokens: int, seed: int) -> list[list[int]]:
    """Return the sentences of each batch, similar lengths together, in an order that the seed decides.

    Args:
        lengths: tokens of each sentence.
        batch_tokens: limit of sentences x (longest + 1), unless one sentence alone exceeds it.
        seed: of this epoch.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(lengths), generator=generator).tolist()
    batches: list[list[int]] = [[]]
    for i in sorted(shuffled, key=lambda i: lengths[i]):
        if batches[-1] and (len(batches[-1]) + 1) * (lengths[i] + 1) > batch_tokens:
            batches.append([])
        batches[-1].append(i)
    return [batches[k] for k in torch.randperm(len(batches), generator=generator).tolist()]


def _batch(texts: list[list[int]], chosen: list[int], device) -> tuple[torch.Tensor, torch.Tensor]:
    rows = [torch.tensor(texts[i], dtype=torch.int64) for i in chosen]
    lens = torch.tensor([len(row) for row in rows])
    return pad_sequence(rows, batch_first=True).to(device), lens.to(device)


@torch.no_grad()
def mean_loss(lm: TokenLm, texts: list[list[int]], batch_tokens: int) -> float:
    """Return the mean negative log-probability of a token (ends of sentences included) in nats."""
    lm.eval()
    device, lengths = lm.output.weight.device, [len(t) for t in texts]
    total = sum(
        lm.loss(*_batch(texts, chosen, device)).double().sum().item()
        for chosen in epoch_batches(lengths, batch_tokens, seed=0)
    )
    return total / sum(n + 1 for n in lengths)


def train_lm(config: TrainLmConfig) -> float:
    """Train, or go on with what ``exp_dir`` holds; return the loss of the model kept, in nats a token.

    Raises:
        DataError: there is no text.
        ConfigError: exp_dir holds a training with other options or another tokenizer.
    """
    if needs_plan(config.optim):
        raise ConfigError(f"--lr-schedule {config.optim.lr_schedule} is of train.py; a language model has eden")
    tokenizer = Tokenizer.load(config.lang_dir)
    texts = [tokenizer.encode(line) for line in sentences(config.source)]
    valid = [tokenizer.encode(line) for line in transcripts(config.valid_cuts)]
    if not texts:
        raise DataError("there is no sentence to train a language model on")
    if config.valid_cuts and not valid:
        raise DataError(f"no cut of --valid-cuts {', '.join(map(str, config.valid_cuts))} has a transcript")
    torch.manual_seed(config.seed)
    device = pick_device(config.device)
    lm = TokenLm(config.model, tokenizer.vocab_size, tokenizer.sos_id).to(device)
    optimizer = build_optimizer(config.optim, lm)
    saved = config_to_dict(config) | {"tokenizer_hash": tokenizer.hash}
    epoch, step, best = _resume(config, saved, lm, optimizer)
    tokenizer.save(config.exp_dir / "tokenizer")
    while epoch < config.num_epochs:
        torch.manual_seed(config.seed + epoch)  # dropout of an epoch does not depend on whether one resumed
        lm.train()
        total, step = _train_epoch(config, lm, optimizer, texts, epoch, step)
        epoch += 1
        loss = mean_loss(lm, valid, config.batch_tokens) if valid else total
        if not max(total, loss) < _LARGEST_LOSS:  # a NaN, too
            raise NumericError(f"the loss of epoch {epoch} is {max(total, loss)}; use a smaller --base-lr")
        logger.info("epoch %d: loss %.4f, kept by %.4f (perplexity %.2f)", epoch, total, loss, math.exp(loss))
        if best is None or loss < best or not valid:
            best = loss
            record = {"epoch": epoch, "loss": loss, "on": "valid" if valid else "train", "optim": asdict(config.optim)}
            save_lm(config.exp_dir / "lm.safetensors", lm, tokenizer.hash, record)
        train = {"step": step, "epoch": epoch, "best": best}
        content = {"model": lm.state_dict(), "optimizer": optimizer.state_dict(), "train": train, "config": saved}
        save_checkpoint(config.exp_dir / f"epoch-{epoch}.pt", content)
        remove_old(config.exp_dir, "epoch", 2)
    return best


def _resume(config: TrainLmConfig, saved: dict, lm: TokenLm, optimizer) -> tuple[int, int, float | None]:
    """Load the newest checkpoint; return epochs and steps done and the best loss."""
    found = load_newest(config.exp_dir)
    if found is None:
        return 0, 0, None
    path, checkpoint = found
    changed = [k for k, v in saved.items() if k not in _FREE and checkpoint.get("config", {}).get(k) != v]
    if changed:
        raise ConfigError(
            f"{path} was trained with other values of {', '.join(changed)}; take them back or choose another --exp-dir"
        )
    lm.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    train = checkpoint["train"]
    logger.info("going on from %s", path)
    return train["epoch"], train["step"], train["best"]


def _train_epoch(config: TrainLmConfig, lm: TokenLm, optimizer, texts, epoch: int, step: int) -> tuple[float, int]:
    """Return the mean loss a token in nats, and the steps done."""
    device, lengths, total = lm.output.weight.device, [len(t) for t in texts], 0.0
    for chosen in epoch_batches(lengths, config.batch_tokens, config.seed + epoch):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.optim, step, epoch)
        y, y_lens = _batch(texts, chosen, device)
        loss = lm.loss(y, y_lens).sum()
        optimizer.zero_grad()
        (loss / (y_lens + 1).sum()).backward()
        nn.utils.clip_grad_norm_(lm.parameters(), config.optim.grad_clip)
        optimizer.step()
        step, total = step + 1, total + loss.item()
    return total / sum(n + 1 for n in lengths), step
