"""The pair-merging refinement search of the multi-codebook quantizer, by look-ups in a Gram matrix.

The search itself is that of Guo et al., "Predicting Multi-Codebook Vector Quantization Indexes for
Knowledge Distillation" (arXiv 2211.00508): given indexes, each codebook keeps its best entries with the
others held fixed, and neighbouring codebooks are merged until one joint choice remains.

How it is computed is our design.  Half the squared error of a joint choice is, up to a constant of the
frame, a sum of ``<c, c'>`` between chosen centers and of ``<x, c>``.  All ``<c, c'>`` stand in one Gram
matrix and all ``<x, c>`` in one matrix product, so no round of the search touches the embedding dimension.
Scores below are half squared errors less a constant of the (frame, slot), which no ranking sees.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def beam(codebook_size: int, codebooks: int) -> int:
    """Return how many candidates a slot of ``codebooks`` merged codebooks keeps."""
    base = 8 if codebook_size <= 16 else 16
    return min(128, base * 2 ** int(math.log2(codebooks) // 2))


class SearchTables:
    """What the search needs to know about the centers; made once for a set of centers.

    Args:
        centers: (Q, K, C) scaled centers; Q a power of two.
    """

    def __init__(self, centers: Tensor) -> None:
        num_codebooks, size, dim = centers.shape
        centers = centers.detach().float()
        # Centered data and centers give the same errors, and float32 cancels far less in their products.
        mean = centers.mean(dim=1, keepdim=True)
        self.shape = (num_codebooks, size)
        self.offset = mean.sum(dim=(0, 1))
        self.centers = (centers - mean).reshape(num_codebooks * size, dim)
        gram = self.centers @ self.centers.T
        # A codebook never meets itself in a joint choice, so its own block is free to hold half of the
        # energies: then the sum of the rows of the chosen entries is the score of every single change.
        blocks = gram.view(num_codebooks, size, num_codebooks, size)
        energy = gram.diagonal().reshape(num_codebooks, size).clone()
        for n in range(num_codebooks):
            blocks[n, :, n, :] = 0.5 * energy[n]
        self.gram = gram
        self.first = torch.arange(num_codebooks, device=centers.device) * size
        self.pairs = torch.triu_indices(num_codebooks, num_codebooks, 1, device=centers.device)

    def products(self, x: Tensor) -> Tensor:
        """Return ``<x, c>`` of centered frames and centers, (N, Q*K), for frames (N, C)."""
        return (x.float() - self.offset) @ self.centers.T

    def bytes_per_frame(self) -> int:
        """Return a bound of the search's working memory for one frame."""
        num_codebooks, size = self.shape
        cut = min(beam(size, 1), size)
        pair_table = num_codebooks * (num_codebooks - 1) // 2 * cut * cut
        return 16 * num_codebooks * size + 20 * pair_table + 28 * num_codebooks * cut * cut


def _take(table: Tensor, index: Tensor) -> Tensor:
    """Return ``table.flatten()[index]``."""
    return table.view(-1).index_select(0, index.view(-1)).view(index.shape)


def _keep(score: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Return scores and positions of the ``keep`` lowest scores of the last axis, in any order."""
    if keep == 1:
        return score.min(dim=-1, keepdim=True)
    if keep >= score.shape[-1]:
        return score, torch.arange(score.shape[-1], device=score.device).expand(score.shape)
    return score.topk(keep, dim=-1, largest=False, sorted=False)


def _pair_table(tables: SearchTables, chosen: Tensor, candidates: Tensor) -> Tensor:
    """Return ``<delta_p[a], delta_q[b]>`` of all slots p < q, (P, N, K', K'), less constants of (pair, frame).

    Pairs lead, so that the look-ups of all frames in one block of the Gram matrix follow each other.

    Args:
        chosen: (Q, N, 1) int32 rows of the present entries in the Gram matrix.
        candidates: (Q, N, K') int32 rows of the candidates; delta is candidate minus present entry.
    """
    p, q = tables.pairs
    width = tables.gram.shape[1]
    left, right = candidates[p] * width, candidates[q]
    table = _take(tables.gram, left.unsqueeze(3) + right.unsqueeze(2))
    table -= _take(tables.gram, left + chosen[q]).unsqueeze(3)
    table -= _take(tables.gram, chosen[p] * width + right).unsqueeze(2)
    return table


def _merge_pairs(table: Tensor, place: Tensor, even: Tensor, odd: Tensor) -> Tensor:
    """Return the pair table of merged slots from that of their halves.

    Args:
        table: (P, N, K', K') of the halves.
        place: (slots, slots) position of a pair of halves in ``table``.
        even: (slots/2, N, K'') int32 which candidate of the even half each merged candidate took; odd likewise.
    """
    p, q = torch.triu_indices(len(even), len(even), 1, device=table.device)
    _, frames, size, _ = table.shape
    frame = torch.arange(frames, device=table.device, dtype=torch.int32).view(1, -1, 1) * (size * size)
    merged = None
    for i, left in enumerate((even, odd)):
        left = left[p] * size + frame
        for j, right in enumerate((even, odd)):
            start = place[2 * p + i, 2 * q + j].int() * (frames * size * size)
            part = _take(table, (left + start.view(-1, 1, 1)).unsqueeze(3) + right[q].unsqueeze(2))
            merged = part if merged is None else merged.add_(part)
    return merged


def refine_once(tables: SearchTables, products: Tensor, codes: Tensor) -> Tensor:
    """Return the indexes after one refinement search.

    Args:
        products: (N, Q*K) from :meth:`SearchTables.products`.
        codes: (N, Q) int64 present indexes.
    Returns:
        (N, Q) int64 indexes, nearly always of lower or equal squared error.
    """
    slots, codebook_size = tables.shape
    chosen = codes + tables.first
    score = F.embedding_bag(chosen, tables.gram, mode="sum").sub_(products).view(-1, slots, codebook_size)
    score, first = _keep(score, 1 if slots == 1 else min(beam(codebook_size, 1), codebook_size))
    if slots == 1:
        return first.squeeze(2)
    # (N, Q, K') -> (Q, N, K')
    score, first = score.transpose(0, 1), first.transpose(0, 1)
    rows = (first + tables.first.view(-1, 1, 1)).int()
    table = _pair_table(tables, chosen.T.unsqueeze(2).int(), rows)
    merged, picks = 1, []
    while slots > 1:
        size, merged = score.shape[-1], 2 * merged
        place = torch.zeros(slots, slots, dtype=torch.int64, device=codes.device)
        left, right = torch.triu_indices(slots, slots, 1, device=codes.device)
        place[left, right] = torch.arange(len(left), device=codes.device)
        slots //= 2
        cross = table[place[0::2, 1::2].diagonal()]
        score = (cross + score[0::2].unsqueeze(3) + score[1::2].unsqueeze(2)).flatten(2)
        score, kept = _keep(score, 1 if slots == 1 else min(beam(codebook_size, merged), size * size))
        picks.append((kept // size, kept % size))
        if slots > 1:
            table = _merge_pairs(table, place, *(pick.int() for pick in picks[-1]))
    # Walk back from the best joint choice to the entry of each codebook.
    choice = torch.zeros(1, len(codes), 1, dtype=torch.int64, device=codes.device)
    for even, odd in reversed(picks):
        choice = torch.stack([even.gather(2, choice), odd.gather(2, choice)], dim=1).flatten(0, 1)
    return first.gather(2, choice).squeeze(2).T.contiguous()


@torch.no_grad()
def refine(tables: SearchTables, products: Tensor, codes: Tensor, rounds: int, chunk_bytes: int = 2**26) -> Tensor:
    """Return the indexes after ``rounds`` refinement searches, in bounded memory.

    A round is a function of frame and indexes alone, so a frame whose indexes did not change is finished.

    Args:
        products: (N, Q*K) from :meth:`SearchTables.products`.
        codes: (N, Q) int64 initial indexes.
        rounds: number of searches.
        chunk_bytes: working memory of the search, in bytes.
    Returns:
        (N, Q) int64.
    """
    codes = codes.clone()
    chunk = max(1, chunk_bytes // tables.bytes_per_frame())
    active = torch.arange(len(codes), device=codes.device)
    for _ in range(rounds):
        still = []
        for index in active.split(chunk):
            # The first round takes every frame: then a slice saves the copy.
            whole = len(active) == len(codes)
            part = slice(int(index[0]), int(index[-1]) + 1) if whole and len(index) else index
            old = codes[part]
            new = refine_once(tables, products[part], old)
            still.append(index[(new != old).any(dim=1)])
            codes[part] = new
        active = torch.cat(still) if still else active[:0]
        if not len(active):
            break
    return codes
