"""A small neural language model over tokens: embedding, LSTM, output layer (Mikolov et al. 2010, with an LSTM)."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from icefall_kd.errors import ConfigError, DataError
from icefall_kd.runtime.files import reading
from icefall_kd.runtime.tensors import read_tensors, stated, write_tensors
from icefall_kd.train.checkpoint import state_sha256

# Hidden state and cell of every layer, each (layers, N, H).
LmState = tuple[Tensor, Tensor]
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class LmConfig:
    """Sizes of the neural language model."""

    lm_embedding_dim: int = 256
    """Dimension of the token embeddings."""
    lm_hidden_dim: int = 512
    """Hidden units H of a layer."""
    lm_layers: int = 1
    """LSTM layers."""
    lm_dropout: float = 0.1
    """Dropout of embeddings and outputs, in training."""

    def __post_init__(self) -> None:
        if min(self.lm_embedding_dim, self.lm_hidden_dim, self.lm_layers) < 1 or not 0 <= self.lm_dropout < 1:
            raise ConfigError(
                "--lm-embedding-dim, --lm-hidden-dim and --lm-layers must be at least 1, --lm-dropout in 0 ... 1"
            )


class TokenLm(nn.Module):
    """Predict each token from all before it; sos/eos begins and ends a sentence."""

    def __init__(self, config: LmConfig, vocab_size: int, sos_id: int = 1) -> None:
        super().__init__()
        self.config, self.vocab_size, self.sos_id = config, vocab_size, sos_id
        self.embedding = nn.Embedding(vocab_size, config.lm_embedding_dim)
        self.dropout = nn.Dropout(config.lm_dropout)
        self.lstm = nn.LSTM(config.lm_embedding_dim, config.lm_hidden_dim, config.lm_layers, batch_first=True)
        self.output = nn.Linear(config.lm_hidden_dim, vocab_size)

    def forward(self, y: Tensor, state: LmState | None = None) -> tuple[Tensor, LmState]:
        """Return the logits of what follows each token.

        Args:
            y: (N, U) token ids, the first of a sentence being sos.
            state: after the tokens before y; None: there are none.
        Returns:
            Logits (N, U, V) and the state after y.
        """
        x, state = self.lstm(self.dropout(self.embedding(y)), state)
        return self.output(self.dropout(x)), state

    def loss(self, y: Tensor, y_lens: Tensor) -> Tensor:
        """Return the negative log-probability of each sentence, its end included, (N,) in nats.

        Args:
            y: (N, U) token ids without sos and eos; what lies beyond the lengths is ignored.
            y_lens: (N,).
        """
        valid = torch.arange(y.size(1) + 1, device=y.device) <= y_lens[:, None]  # (N, U + 1)
        inside = valid[:, 1:]
        y = torch.where(inside, y, self.sos_id)
        edge = torch.full_like(y[:, :1], self.sos_id)
        logits, _ = self(torch.cat([edge, y], dim=1))
        target = torch.cat([y, edge], dim=1)
        loss = nn.functional.cross_entropy(logits.float().transpose(1, 2), target, reduction="none")  # (N, U + 1)
        return (loss * valid).sum(dim=1)


def save_lm(file: Path, lm: TokenLm, tokenizer_hash: str, record: dict) -> None:
    """Write one safetensors file: the parameters, and what the model is as metadata.

    Args:
        file: usually ``lm.safetensors``.
        lm: the model.
        tokenizer_hash: of the tokens.
        record: anything else worth knowing, as plain data.
    """
    content = {"format": FORMAT_VERSION, "model": asdict(lm.config), "vocab_size": lm.vocab_size, "sos_id": lm.sos_id}
    content |= {"tokenizer_hash": tokenizer_hash, **record, "sha256": state_sha256(lm.state_dict())}
    write_tensors(file, lm.state_dict(), {"lm": json.dumps(content)})


def load_lm(file: Path, tokenizer_hash: str) -> TokenLm:
    """Read what :func:`save_lm` wrote, in evaluation mode.

    Raises:
        DataError: the file is missing, damaged, or no language model of ours.
        ConfigError: the model is of another tokenizer.
    """
    metadata, tensors = read_tensors(file)
    content = stated(metadata, file, "lm")
    if content.get("format") != FORMAT_VERSION:
        raise DataError(f"{file} is no language model of format {FORMAT_VERSION}; train one with local/train_lm.py")
    if content.get("tokenizer_hash") != tokenizer_hash:
        raise ConfigError(
            f"{file} is a language model of tokenizer {content.get('tokenizer_hash')}, the model to decode has "
            f"{tokenizer_hash}; train one with local/train_lm.py --lang-dir of that training"
        )
    digest = content.pop("sha256", None)  # files before this version have none
    if digest is not None and digest != state_sha256(tensors):
        raise DataError(f"{file} is not as it was written (its checksum differs); copy it again, or train it again")
    with reading(str(file), "train one with local/train_lm.py"):
        try:
            config, vocab_size = LmConfig(**content["model"]), content["vocab_size"]
        except ConfigError as error:
            raise ValueError(str(error)) from error
        # Memory is asked for only where the tensors of the file are as large.
        sizes = {"embedding.weight": (vocab_size, config.lm_embedding_dim)}
        sizes[f"lstm.weight_hh_l{config.lm_layers - 1}"] = (4 * config.lm_hidden_dim, config.lm_hidden_dim)
        for name, shape in sizes.items():
            if tuple(tensors[name].shape) != shape:
                raise ValueError(f"{name} is {tuple(tensors[name].shape)}, not {shape}")
        lm = TokenLm(config, vocab_size, content["sos_id"])
        lm.load_state_dict(tensors)
    return lm.eval()
