"""A Transformer decoder over tokens: left to right, or all positions at once (conditional masked language model)."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icefall_kd.errors import ConfigError
from icefall_kd.models.dropout import Dropout
from icefall_kd.models.masks import make_pad_mask


@dataclass(frozen=True)
class DecoderMemory:
    """Encoder output as the decoder's layers look at it: computed once, however many passes follow."""

    keys: list[Tensor]
    """(N, H, T', D) of each layer."""
    values: list[Tensor]
    """(N, H, T', D) of each layer."""
    seen: Tensor
    """(N, 1, 1, T') bool, True where a frame may be looked at."""

    def __len__(self) -> int:
        return self.seen.shape[0]

    def select(self, utterances: Tensor) -> "DecoderMemory":
        """Return the memory of some utterances, by their numbers (M,)."""
        keys, values = ([x[utterances] for x in part] for part in (self.keys, self.values))
        return DecoderMemory(keys, values, self.seen[utterances])


@dataclass
class TokenCache:
    """What causal self-attention remembers of R token sequences."""

    keys: list[Tensor]
    """(R, H, U, D) of each layer, of the tokens heard so far."""
    values: list[Tensor]

    @property
    def length(self) -> int:
        """Number of tokens heard so far."""
        return self.keys[0].shape[2]

    def reorder(self, rows: Tensor) -> None:
        """Let row i go on from what row ``rows[i]`` was, (R',)."""
        self.keys = [x[rows] for x in self.keys]
        self.values = [x[rows] for x in self.values]


@dataclass
class DecoderCache(TokenCache):
    """The same of R = N * G token sequences, G of each utterance in a row, which look at N utterances.

    A reordering keeps as many rows an utterance for each one.
    """

    memory: DecoderMemory


def sinusoids(positions: Tensor, dim: int) -> Tensor:
    """Return the positional encodings (U, C) of positions (U,) (Vaswani et al. 2017, section 3.5)."""
    rate = torch.exp(torch.arange(0, dim, 2, device=positions.device) * (-math.log(10000.0) / dim))
    angle = positions.float().unsqueeze(1) * rate
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)


class DecoderLayer(nn.Module):
    """Pre-norm self-attention, attention to the encoder (or none), feed-forward with ReLU."""

    def __init__(
        self, dim: int, num_heads: int, feedforward_dim: int, dropout: float, cross_attention: bool = True
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.self_norm = nn.LayerNorm(dim)
        self.cross_norm = nn.LayerNorm(dim) if cross_attention else None
        self.feedforward_norm = nn.LayerNorm(dim)
        self.self_qkv, self.self_out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        if cross_attention:
            self.cross_q, self.cross_kv, self.cross_out = (
                nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim),
            )  # fmt: skip
        self.expand, self.contract = nn.Linear(dim, feedforward_dim), nn.Linear(feedforward_dim, dim)
        self.dropout = Dropout(dropout)

    def heads(self, x: Tensor, count: int) -> tuple[Tensor, ...]:
        """Split (N, U, count * C) into ``count`` times (N, H, U, D)."""
        return x.view(*x.shape[:2], count, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(
        self,
        x: Tensor,
        seen: Tensor,
        memory: tuple[Tensor, Tensor, Tensor] | None,
        past: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Apply the layer.

        Args:
            x: (R, U, C), R a multiple of the memory's N.
            seen: bool that broadcasts to (R, 1, U, K), True where a token may look.
            memory: keys and values (N, H, T', D), and (N, 1, 1, T') where they may be looked at; None of a layer
                without attention to the encoder.
            past: keys and values (R, H, K - U, D) of earlier tokens.
        Returns:
            (R, U, C), and the keys and values (R, H, K, D) of all tokens.
        """
        q, k, v = self.heads(self.self_qkv(self.self_norm(x)), 3)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        x = x + self.dropout(self.self_out(y.transpose(1, 2).flatten(2)))
        if self.cross_norm is not None:
            x = x + self.dropout(self._look(x, *memory))
        hidden = self.dropout(F.relu(self.expand(self.feedforward_norm(x))))
        return x + self.dropout(self.contract(hidden)), (k, v)

    def _look(self, x: Tensor, keys: Tensor, values: Tensor, frames: Tensor) -> Tensor:
        rows, length, dim = x.shape
        # All sequences of an utterance are queries on its one memory: nothing of the encoder is copied for a beam.
        (q,) = self.heads(self.cross_q(self.cross_norm(x)).view(keys.shape[0], -1, dim), 1)  # (N, H, R/N * U, D)
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=frames)
        return self.cross_out(y.transpose(1, 2).reshape(rows, length, dim))


class AttentionDecoder(nn.Module):
    """Embedding, positions, layers, output layer; ``causal`` says whether a token sees those behind it.

    The same module is the autoregressive teacher's decoder (input sos and tokens, output the next token) and the
    student's conditional masked language model (input tokens and masks, output the token of each position;
    Ghazvininejad et al. 2019, Higuchi et al. 2020), so that weights can be handed from one to the other.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        num_layers: int,
        num_heads: int,
        feedforward_dim: int,
        dropout: float = 0.1,
        *,
        causal: bool,
        tie_embeddings: bool = False,
    ) -> None:
        """Make the decoder.

        Args:
            vocab_size: tokens V, blank, sos/eos, unknown and mask included.
            dim: C of encoder and decoder.
            num_layers, num_heads, feedforward_dim, dropout: of the layers.
            causal: left to right.
            tie_embeddings: the embeddings are the weights of the output layer too.
        Raises:
            ConfigError: the heads do not divide the dimension.
        """
        super().__init__()
        if dim % (2 * num_heads):
            raise ConfigError(f"--decoder-heads is {num_heads}; the dimension {dim} must be an even multiple of it")
        self.vocab_size, self.dim, self.causal = vocab_size, dim, causal
        self.embedding = nn.Embedding(vocab_size, dim)
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)  # of size one after the scaling in front of the layers
        self.dropout = Dropout(dropout)
        self.layers = nn.ModuleList(
            DecoderLayer(dim, num_heads, feedforward_dim, dropout) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(dim)
        self.output = None if tie_embeddings else nn.Linear(dim, vocab_size)
        self.output_bias = nn.Parameter(torch.zeros(vocab_size)) if tie_embeddings else None

    def memory(self, encoder_out: Tensor, encoder_out_lens: Tensor) -> DecoderMemory:
        """Return what the layers see of encoder_out (N, T', C) with (N,) valid frames; of no frame, the first."""
        projected = [layer.heads(layer.cross_kv(encoder_out), 2) for layer in self.layers]
        lens = encoder_out_lens.to(encoder_out.device).clamp(min=1)
        seen = ~make_pad_mask(lens, encoder_out.shape[1])[:, None, None, :]
        return DecoderMemory([k for k, _ in projected], [v for _, v in projected], seen)

    def forward(self, y: Tensor, y_lens: Tensor, memory: DecoderMemory, at: Tensor | None = None) -> Tensor:
        """Return the logits of every position, or of some.

        Args:
            y: (R, U) token ids, R = N * G: G sequences of each utterance of the memory, one after the other; any
                valid id beyond the lengths.
            y_lens: (R,) valid tokens; a row without tokens returns nothing of use.
            memory: of :meth:`memory`.
            at: (R, S) positions whose logits are wanted; None: all.
        Returns:
            (R, U, V), or (R, S, V): causal, of the token that follows each; else of the token that stands there.
        """
        seen = ~make_pad_mask(y_lens.to(y.device).clamp(min=1), y.shape[1])[:, None, None, :]  # (R, 1, 1, U)
        if self.causal:
            seen = seen & seen.new_ones(y.shape[1], y.shape[1]).tril()
        x = self._embed(y, 0)
        for i, layer in enumerate(self.layers):
            x, _ = layer(x, seen, (memory.keys[i], memory.values[i], memory.seen))
        return self._logits(x if at is None else x.gather(1, at.unsqueeze(2).expand(-1, -1, self.dim)))

    def start(self, memory: DecoderMemory, rows: int) -> DecoderCache:
        """Return the cache of ``rows`` empty sequences (a multiple of N) of a causal decoder."""
        shape = memory.keys[0].shape
        empty = [k.new_zeros(rows, shape[1], 0, shape[3]) for k in memory.keys]
        return DecoderCache(empty, list(empty), memory)

    def step(self, y: Tensor, cache: DecoderCache) -> Tensor:
        """Append one token to every sequence of the cache and return the logits (R, V) of what follows.

        Args:
            y: (R,) token ids, sos first.
            cache: of :meth:`start`; it is changed.
        """
        x, memory = self._embed(y.unsqueeze(1), cache.length), cache.memory
        seen = x.new_ones(1, 1, 1, 1, dtype=torch.bool)
        for i, layer in enumerate(self.layers):
            x, (cache.keys[i], cache.values[i]) = layer(
                x, seen, (memory.keys[i], memory.values[i], memory.seen), (cache.keys[i], cache.values[i])
            )
        return self._logits(x).squeeze(1)

    def _embed(self, y: Tensor, begin: int) -> Tensor:
        x = self.embedding(y) * math.sqrt(self.dim)
        positions = torch.arange(begin, begin + y.shape[1], device=y.device)
        return self.dropout(x + sinusoids(positions, self.dim).to(x.dtype))

    def _logits(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.output(x) if self.output is not None else F.linear(x, self.embedding.weight, self.output_bias)
