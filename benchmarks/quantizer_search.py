"""Time the refinement search in the Gram matrix against the direct one, in the same run and with the same threads.

The direct search materialises the change of the error vector of every surviving candidate, as the
multi_quantization package does (pairs are scored before they are materialised); it is written here anew.

    python benchmarks/quantizer_search.py --dim 384 --num-codebooks 8 --frames 1024 --threads 2
"""

import argparse
import json
import time

import torch

from icefall_kd.quantization.quantizer import Quantizer
from icefall_kd.quantization.search import beam


@torch.no_grad()
def direct_round(centers: torch.Tensor, x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Return the codes (N, Q) after one search that works on vectors of the embedding dimension."""
    slots, size, dim = centers.shape
    frames, merged, codebook_size = len(x), 1, size
    chosen = centers[torch.arange(slots), codes]
    error = chosen.sum(dim=1) - x
    energy = error.square().sum(dim=1)
    rest = error.unsqueeze(1) - chosen  # (N, Q, C)
    score = rest.square().sum(dim=2, keepdim=True) + centers.square().sum(dim=2)
    score += 2 * torch.einsum("qkc,nqc->nqk", centers, rest)
    keep = 1 if slots == 1 else min(size, beam(codebook_size, 1))
    score, kept = (value[..., :keep] for value in score.sort(dim=-1))
    indexes = kept.unsqueeze(3)
    delta = centers[torch.arange(slots).view(1, -1, 1), kept] - chosen.unsqueeze(2)
    while slots > 1:
        size, slots, merged = score.shape[-1], slots // 2, 2 * merged
        cross = delta[:, 0::2] @ delta[:, 1::2].transpose(2, 3)
        score = score[:, 0::2, :, None] + score[:, 1::2, None, :] - energy.view(-1, 1, 1, 1) + 2 * cross
        keep = 1 if slots == 1 else min(size * size, beam(codebook_size, merged))
        score, kept = (value[..., :keep] for value in score.flatten(2).sort(dim=-1))
        even, odd = (kept // size).unsqueeze(3), (kept % size).unsqueeze(3)
        if slots > 1:
            delta = delta[:, 0::2].gather(2, even.expand(-1, -1, -1, dim)) + delta[:, 1::2].gather(
                2, odd.expand(-1, -1, -1, dim)
            )
        left = indexes[:, 0::2].gather(2, even.expand(-1, -1, -1, merged // 2))
        right = indexes[:, 1::2].gather(2, odd.expand(-1, -1, -1, merged // 2))
        indexes = torch.cat([left, right], dim=3)
    return indexes[:, 0, 0].view(frames, -1)


@torch.no_grad()
def direct_encode(quantizer: Quantizer, x: torch.Tensor, refine_iters: int, chunk: int = 512) -> torch.Tensor:
    """Return codes (N, Q) of the direct search, in chunks of frames."""
    centers = quantizer.scaled_centers()
    out = []
    for part in x.split(chunk):
        codes = quantizer.logits(part).argmax(dim=-1)
        for _ in range(refine_iters):
            codes = direct_round(centers, part, codes)
        out.append(codes)
    return torch.cat(out)


def best_of(run, repeats: int) -> tuple[float, torch.Tensor]:
    """Return the shortest time in seconds and the result."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = run()
        times.append(time.perf_counter() - start)
    return min(times), result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--num-codebooks", type=int, default=8)
    parser.add_argument("--frames", type=int, default=1024)
    parser.add_argument("--refine-iters", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quantizer", help="a trained quantizer and random Gaussian frames around its mean")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.quantizer:
        quantizer = Quantizer.load(args.quantizer)
    else:
        quantizer = Quantizer(args.dim, args.num_codebooks)
    x = torch.randn(args.frames, quantizer.dim) * quantizer.scaled_centers().std() + quantizer.mean()
    ours, codes = best_of(lambda: quantizer.encode(x, args.refine_iters).long(), args.repeats)
    direct, expected = best_of(lambda: direct_encode(quantizer, x, args.refine_iters), args.repeats)
    same = (codes == expected).all(dim=1).float().mean().item()
    print(json.dumps({
        "dim": quantizer.dim,
        "num_codebooks": quantizer.num_codebooks,
        "threads": args.threads,
        "direct_frames_per_second": round(args.frames / direct, 1),
        "ours_frames_per_second": round(args.frames / ours, 1),
        "ratio": round(direct / ours, 2),
        "equal_frames": round(same, 5),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
