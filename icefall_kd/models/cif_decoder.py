"""The causal decoder of the CIF recogniser, which is given every fired vector twice."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icefall_kd.errors import ConfigError
from icefall_kd.models.attention_decoder import DecoderLayer, TokenCache, sinusoids
from icefall_kd.models.dropout import Dropout


class CifDecoder(nn.Module):
    """Transformer over tokens without attention to the encoder (Han et al. 2023; layout of their public code).

    For token u, from the tokens y before it and the fired vectors c up to its own:

        d_u = W_in [sqrt(C) Emb(y_{u-1}); c_{u-1}] + PE(u)
        s_u = W_mid [LayerNorm(Transformer(d_0 ... d_u)); c_u]
        logits_u = W_out s_u

    with sos before the first token and 0 as the fired vector before the first; no bias in the three projections.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        num_layers: int,
        num_heads: int,
        feedforward_dim: int,
        dropout: float = 0.2,
        input_dropout: float = 0.1,
    ) -> None:
        """Make the decoder.

        Args:
            vocab_size: tokens V.
            dim: C of encoder and decoder.
            num_layers, num_heads, feedforward_dim, dropout: of the layers.
            input_dropout: of d_u.
        Raises:
            ConfigError: the heads do not divide the dimension.
        """
        super().__init__()
        if dim % (2 * num_heads):
            raise ConfigError(f"--decoder-heads is {num_heads}; the dimension {dim} must be an even multiple of it")
        self.vocab_size, self.dim, self.num_heads = vocab_size, dim, num_heads
        self.embedding = nn.Embedding(vocab_size, dim)
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)  # of size one after the scaling in front of the layers
        self.input = nn.Linear(2 * dim, dim, bias=False)
        self.dropout = Dropout(input_dropout)
        self.layers = nn.ModuleList(
            DecoderLayer(dim, num_heads, feedforward_dim, dropout, cross_attention=False) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(dim)
        self.middle = nn.Linear(2 * dim, dim, bias=False)
        self.output = nn.Linear(dim, vocab_size, bias=False)

    def forward(self, y_in: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and states of all tokens.

        Args:
            y_in: (N, U) the token before each one, sos first; any valid id beyond the lengths.
            c: (N, U, C) fired vectors.
        Returns:
            logits (N, U, V) and states s (N, U, C); those of token u depend on y_in up to u and c up to u alone.
        """
        length = y_in.shape[1]
        x = self._embed(y_in, F.pad(c, (0, 0, 1, 0))[:, :length], 0)
        seen = torch.ones(length, length, dtype=torch.bool, device=c.device).tril()
        for layer in self.layers:
            x, _ = layer(x, seen, None)
        return self._logits(x, c)

    def start(self, rows: int) -> TokenCache:
        """Return the cache of ``rows`` empty sequences."""
        empty = self.embedding.weight.new_zeros(rows, self.num_heads, 0, self.dim // self.num_heads)
        return TokenCache([empty] * len(self.layers), [empty] * len(self.layers))

    def step(self, y_prev: Tensor, c_prev: Tensor, c: Tensor, cache: TokenCache) -> Tensor:
        """Go on by one token in every sequence of the cache.

        Args:
            y_prev: (R,) the token before, sos at first.
            c_prev: (R, C) the fired vector before, 0 at first.
            c: (R, C) the fired vector of the token that is wanted.
            cache: of :meth:`start`; it is changed.
        Returns:
            logits (R, V), equal to those of :meth:`forward`.
        """
        x = self._embed(y_prev.unsqueeze(1), c_prev.unsqueeze(1), cache.length)
        seen = x.new_ones(1, 1, 1, 1, dtype=torch.bool)
        for i, layer in enumerate(self.layers):
            x, (cache.keys[i], cache.values[i]) = layer(x, seen, None, (cache.keys[i], cache.values[i]))
        return self._logits(x, c.unsqueeze(1))[0].squeeze(1)

    def _embed(self, y_prev: Tensor, c_prev: Tensor, begin: int) -> Tensor:
        x = self.input(torch.cat([self.embedding(y_prev) * math.sqrt(self.dim), c_prev], dim=2))
        positions = torch.arange(begin, begin + y_prev.shape[1], device=y_prev.device)
        return self.dropout(x + sinusoids(positions, self.dim).to(x.dtype))

    def _logits(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        states = self.middle(torch.cat([self.norm(x), c], dim=2))
        return self.output(states), states
