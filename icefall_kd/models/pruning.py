"""Magnitude masks in blocks over weights that stay dense: self-pruning.

Of "Learning a Dual-Mode Speech Recognition Model via Self-Pruning" (arXiv 2207.11906) only the abstract is known to us:
a sparse sub-network of the shared weights, trained beside the dense one.  Blocks, ranking, schedule and bookkeeping are
our design; the cubic law is Zhu and Gupta's (arXiv 1710.01878).

A mask is a buffer: saved, restored, never averaged.  No weight is ever overwritten by zero, so a masked one learns on
in the dense mode and comes back when the magnitude of its block rises above the cut.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icefall_kd.config.dual import MAX_SPARSITY
from icefall_kd.errors import ConfigError

# What rounding may take from an exact product of a sparsity and a number of blocks.
_ROUNDING = 1e-9


def block_scores(weight: Tensor, block: tuple[int, int], score: str = "l1") -> Tensor:
    """Return the norms of the blocks, (ceil(O / rows), ceil(I / columns)) float32.

    Args:
        weight: (O, I) output by input; the last blocks are filled up with zeros.
        block: rows and columns.
        score: "l1", the sum of magnitudes, or "l2", the root of the sum of squares.
    """
    rows, columns = block
    out_dim, in_dim = weight.shape
    padded = F.pad(weight.detach().abs().float(), (0, -in_dim % columns, 0, -out_dim % rows))
    blocks = padded.view(-(-out_dim // rows), rows, -(-in_dim // columns), columns)
    return blocks.sum((1, 3)) if score == "l1" else blocks.square().sum((1, 3)).sqrt()


def num_pruned(sparsity: float, num_blocks: int) -> int:
    """Return floor(sparsity * num_blocks), in spite of rounding."""
    return math.floor(sparsity * num_blocks + _ROUNDING)


def block_mask(weight: Tensor, sparsity: float, block: tuple[int, int] = (8, 1), score: str = "l1") -> Tensor:
    """Return which weights of one matrix are kept: all but floor(sparsity * blocks) blocks of the lowest magnitude.

    Args:
        weight: (O, I).
        sparsity: share of blocks, 0 to 1.
        block: rows and columns of a block.
        score: "l1" or "l2", see :func:`block_scores`.
    Returns:
        (O, I) bool; of equal blocks the first ones are pruned, so that the number is exact.
    """
    scores = block_scores(weight, block, score)
    order = scores.flatten().argsort(stable=True)
    return _spread(order[: num_pruned(sparsity, scores.numel())], scores, weight, block)


def _spread(pruned: Tensor, scores: Tensor, weight: Tensor, block: tuple[int, int]) -> Tensor:
    """Return the mask (O, I) without the blocks of these flat numbers."""
    kept = torch.ones(scores.numel(), dtype=torch.bool, device=weight.device)
    kept[pruned] = False
    kept = kept.view_as(scores).repeat_interleave(block[0], dim=0).repeat_interleave(block[1], dim=1)
    return kept[: weight.shape[0], : weight.shape[1]].contiguous()


def global_masks(
    weights: list[Tensor], sparsity: float, block: tuple[int, int] = (8, 1), score: str = "l1"
) -> list[Tensor]:
    """Return the masks of several matrices whose blocks are ranked together.

    Scores are divided by the root mean square of their matrix, since otherwise whole layers of small weights would go;
    no matrix loses more than 95 % of its blocks.

    Args:
        weights: matrices (O, I).
        sparsity: share of all blocks, at most 0.95.
        block: rows and columns of a block.
        score: "l1" or "l2", see :func:`block_scores`.
    Returns:
        A mask (O, I) for each; floor(sparsity * all blocks) blocks are pruned, as far as the cap allows.
    """
    scores = [block_scores(w, block, score) for w in weights]
    orders = [s.flatten().argsort(stable=True)[: num_pruned(MAX_SPARSITY, s.numel())] for s in scores]
    candidates = []
    for weight, each, order in zip(weights, scores, orders, strict=True):
        rms = weight.detach().float().square().mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
        candidates.append(each.flatten()[order] / rms)
    cut = num_pruned(sparsity, sum(s.numel() for s in scores))
    chosen = torch.zeros(sum(len(c) for c in candidates), dtype=torch.bool, device=weights[0].device)
    chosen[torch.cat(candidates).argsort(stable=True)[:cut]] = True
    masks = []
    for weight, each, order, picked in zip(
        weights, scores, orders, chosen.split([len(c) for c in candidates]), strict=True
    ):
        masks.append(_spread(order[picked], each, weight, block))
    return masks


def sparsity_at(step: int, final: float, begin: int, end: int) -> float:
    """Return the sparsity of a step: 0 before ``begin``, ``final`` from ``end`` on, between them by the cubic law."""
    if step >= end:
        return final
    return final * (1.0 - (1.0 - (step - begin) / (end - begin)) ** 3) if step > begin else 0.0


class PrunableLinear(nn.Linear):
    """A linear layer that can also be run without its masked weights.

    ``sparse`` chooses: x (W . M)^T + b, or x W^T + b.  The gradient of W is masked like W, unless ``straight_through``.
    """

    mask: Tensor
    """(O, I) bool, True where a weight is kept."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, matrices: int = 1) -> None:
        """Make the layer, with everything kept.

        Args:
            in_features: I.
            out_features: O.
            bias: add one.
            matrices: matrices of equal size that are stacked along O (query, key and value); each is ranked by itself.
        """
        super().__init__(in_features, out_features, bias)
        self.matrices = matrices
        self.sparse = self.straight_through = False
        self.trial: Tensor | None = None
        """Takes the place of the mask for a while; never saved."""
        self.register_buffer("mask", torch.ones(out_features, in_features, dtype=torch.bool))

    @classmethod
    def wrap(cls, linear: nn.Linear, matrices: int = 1) -> "PrunableLinear":
        """Return a layer with the very parameters of ``linear``; nothing is drawn."""
        if linear.out_features % matrices:
            raise ConfigError(f"{linear.out_features} output rows are no {matrices} matrices of equal size")
        with torch.device("meta"):
            layer = cls(linear.in_features, linear.out_features, linear.bias is not None, matrices)
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.mask = torch.ones_like(linear.weight, dtype=torch.bool)
        return layer.train(linear.training)

    def effective_weight(self) -> Tensor:
        """Return the (O, I) weights of the present mode."""
        if not self.sparse:
            return self.weight
        masked = self.weight * (self.mask if self.trial is None else self.trial)
        return self.weight + (masked - self.weight).detach() if self.straight_through else masked

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., I) to (..., O)."""
        return F.linear(x, self.effective_weight(), self.bias)


def prunable_layers(model: nn.Module) -> dict[str, PrunableLinear]:
    """Return the prunable layers of a model by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, PrunableLinear)}


@torch.no_grad()
def make_masks(
    layers: Mapping[str, PrunableLinear],
    sparsity: float,
    block: tuple[int, int],
    ranking: str = "uniform",
    score: str = "l1",
) -> dict[str, Tensor]:
    """Return new masks (O, I) of layers by name, from the present magnitudes.

    Args:
        layers: those of :func:`prunable_layers`.
        sparsity: share of blocks.
        block: rows and columns of a block.
        ranking: "uniform" (every matrix) or "global" (all together).
        score: "l1" or "l2", see :func:`block_scores`.
    """
    matrices = {name: layer.weight.chunk(layer.matrices) for name, layer in layers.items()}
    if ranking == "global" and matrices:
        flat = iter(global_masks([w for parts in matrices.values() for w in parts], sparsity, block, score))
        return {name: torch.cat([next(flat) for _ in parts]) for name, parts in matrices.items()}
    return {name: torch.cat([block_mask(w, sparsity, block, score) for w in parts]) for name, parts in matrices.items()}


@dataclass(frozen=True)
class MaskChange:
    """How two sets of masks of the same weights differ."""

    churn: float
    """Share of the weights kept now that were not kept before; the schedule alone, which only takes away, adds none."""
    iou: float
    """Weights kept by both over weights kept by either."""


def compare_masks(before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> MaskChange:
    """Compare masks by name, for instance those of two checkpoints.

    Raises:
        ConfigError: the names differ.
    """
    if before.keys() != now.keys():
        raise ConfigError(f"masks of different layers: {', '.join(sorted(before.keys() ^ now.keys())[:5])}")
    both = sum(int((before[name] & mask).sum()) for name, mask in now.items())
    either = sum(int((before[name] | mask).sum()) for name, mask in now.items())
    kept = sum(int(mask.sum()) for mask in now.values())
    return MaskChange(churn=1 - both / kept if kept else 0.0, iou=both / either if either else 1.0)


def actual_sparsity(masks: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the share of masked weights of every layer."""
    return {name: 1 - float(mask.float().mean()) for name, mask in masks.items()}


@dataclass(frozen=True)
class SparseSize:
    """What a model takes when only the kept blocks of its prunable matrices are stored."""

    prunable: int
    """Weights of prunable matrices."""
    nonzeros: int
    """Those that are kept."""
    blocks: int
    """Blocks that hold them; each needs an index."""
    rest: int
    """All other parameters of one mode: of the norms of two modes, those of one."""

    def sparse_bytes(self, weight_bytes: float = 1, index_bytes: float = 2) -> float:
        """Return the bytes of kept weights, their blocks' indexes and the rest."""
        return (self.nonzeros + self.rest) * weight_bytes + self.blocks * index_bytes

    def dense_bytes(self, weight_bytes: float = 1) -> float:
        """Return the bytes of all parameters."""
        return (self.prunable + self.rest) * weight_bytes


def sparse_size(model: nn.Module, block: tuple[int, int] = (8, 1)) -> SparseSize:
    """Count the parameters of one mode of a model by where they are stored."""
    layers = prunable_layers(model)
    idle = sum(p.numel() for m in model.modules() if hasattr(m, "idle") for p in m.idle.parameters())
    prunable = sum(layer.weight.numel() for layer in layers.values())
    blocks = 0
    for layer in layers.values():
        for mask in layer.mask.chunk(layer.matrices):
            blocks += int((block_scores(mask.float(), block) > 0).sum())
    return SparseSize(
        prunable=prunable,
        nonzeros=sum(int(layer.mask.sum()) for layer in layers.values()),
        blocks=blocks,
        rest=sum(p.numel() for p in model.parameters()) - prunable - idle,
    )
