"""The pair-merging refinement search of the multi-codebook quantizer, by look-ups in a Gram matrix.

The search itself is that of multi_quantization 0.1.1, the package of the authors of MVQ-KD (Guo et al.,
arXiv 2211.00508): given indexes, each codebook keeps its best entries with the others held fixed, and
neighbouring codebooks are merged until one joint choice remains.  How many are kept is the package's too.

How it is computed is our design.  Half the squared error of a joint choice is, up to a constant of the
frame, a sum of ``<c, c'>`` between chosen centers and of ``<x, c>``.  All ``<c, c'>`` stand in one Gram
matrix and all ``<x, c>`` in one matrix product, so no round of the search touches the embedding dimension.
On a CPU the rounds run in C++ where it can be compiled (:mod:`icefall_kd.quantization.native`), with equal scores.
Scores below are half squared errors less a constant of the (frame, slot), which no ranking sees.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from icefall_kd.quantization import native


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

    def products(self, x: Tensor) -> Tensor:
        """Return ``<x, c>`` of centered frames and centers, (N, Q*K), for frames (N, C)."""
        return (x.float() - self.offset) @ self.centers.T

    def bytes_per_frame(self) -> int:
        """Return a bound of the search's working memory for one frame."""
        num_codebooks, size = self.shape
        cut = min(beam(size, 2), size * size)
        half = num_codebooks // 2
        pairs = half * (half - 1) // 2 + half
        return 16 * num_codebooks * size + 16 * pairs * cut * cut + 40 * half * cut * cut


def _take(table: Tensor, index: Tensor) -> Tensor:
    """Return ``table.flatten()[index]``."""
    return table.view(-1).index_select(0, index.view(-1)).view(index.shape)


def _keep(score: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Return scores and positions of the ``keep`` lowest scores of the last axis, in the order of their positions.

    So the first of equal scores wins in the end, as in the C++ search; equal entries are common, as silence is.
    """
    if keep == 1:
        return score.min(dim=-1, keepdim=True)
    if keep >= score.shape[-1]:
        return score, torch.arange(score.shape[-1], device=score.device).expand(score.shape)
    kept = score.topk(keep, dim=-1, largest=False, sorted=False).indices.sort(dim=-1).values
    return score.gather(-1, kept), kept


def _pair_table(gram: Tensor, chosen: Tensor, rows: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """Return ``<delta_p[a], delta_q[b]>`` of pairs of slots, (P, N, K', K'), less constants of (pair, frame).

    Pairs lead, so that the look-ups of all frames in one block of the Gram matrix follow each other.

    Args:
        gram: (Q*K, Q*K).
        chosen: (slots, H, N, 1) int32 rows, in the Gram matrix, of the present entries of a slot's H codebooks.
        rows: (slots, H, N, K') int32 rows of the candidates' entries; delta is candidate minus present.
        p: (P,) first slots, q: (P,) second slots.
    """
    width, members = gram.shape[1], range(rows.shape[1])
    table = even = odd = None
    for i in members:
        left, left_chosen = rows[p, i] * width, chosen[p, i] * width
        for j in members:
            right = rows[q, j]
            part = _take(gram, left.unsqueeze(3) + right.unsqueeze(2))
            part_even, part_odd = _take(gram, left + chosen[q, j]), _take(gram, left_chosen + right)
            table = part if table is None else table.add_(part)
            even = part_even if even is None else even.add_(part_even)
            odd = part_odd if odd is None else odd.add_(part_odd)
    return table.sub_(even.unsqueeze(3)).sub_(odd.unsqueeze(2))


def _places(slots: int, device: torch.device) -> Tensor:
    """Return (slots, slots): where the pair (p, q), p < q, stands in a pair table."""
    p, q = torch.triu_indices(slots, slots, 1, device=device)
    places = torch.zeros(slots, slots, dtype=torch.int64, device=device)
    places[p, q] = torch.arange(len(p), device=device)
    return places


def _merge_pairs(table: Tensor, even: Tensor, odd: Tensor) -> Tensor:
    """Return the pair table of merged slots from that of their halves.

    Args:
        table: (P, N, K', K') of all pairs of the halves.
        even: (slots/2, N, K'') int32 which candidate of the even half each merged candidate took; odd likewise.
    """
    p, q = torch.triu_indices(len(even), len(even), 1, device=table.device)
    places = _places(2 * len(even), table.device)
    _, frames, size, _ = table.shape
    frame = torch.arange(frames, device=table.device, dtype=torch.int32).view(1, -1, 1) * (size * size)
    merged = None
    for i, left in enumerate((even, odd)):
        left = left[p] * size + frame
        for j, right in enumerate((even, odd)):
            start = places[2 * p + i, 2 * q + j].int() * (frames * size * size)
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
    rows = (first + tables.first.view(-1, 1, 1)).int().unsqueeze(1)
    chosen = chosen.T.int().view(slots, 1, -1, 1)
    evens = torch.arange(0, slots, 2, device=codes.device)
    cross = _pair_table(tables.gram, chosen, rows, evens, evens + 1)
    table, merged, picks = None, 1, []
    while True:
        slots, merged, size = slots // 2, 2 * merged, score.shape[-1]
        score = (cross + score[0::2].unsqueeze(3) + score[1::2].unsqueeze(2)).flatten(2)
        score, kept = _keep(score, 1 if slots == 1 else min(beam(codebook_size, merged), size * size))
        picks.append((kept // size, kept % size))
        if slots == 1:
            break
        if table is None:
            # Only neighbours had to meet so far; from here on every pair of slots is needed.
            halves = [rows[i::2].squeeze(1).gather(2, pick) for i, pick in enumerate(picks[-1])]
            p, q = torch.triu_indices(slots, slots, 1, device=codes.device)
            table = _pair_table(tables.gram, chosen.view(slots, 2, -1, 1), torch.stack(halves, dim=1), p, q)
        else:
            table = _merge_pairs(table, *(pick.int() for pick in picks[-1]))
        cross = table[_places(slots, codes.device)[0::2, 1::2].diagonal()]
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
    num_codebooks, size = tables.shape
    beams = [beam(size, 2**level) for level in range(num_codebooks.bit_length())]
    refined = native.refine(tables.gram, products, codes, beams, rounds)
    if refined is not None:
        return refined
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
