"""Frames far outside the rest: kept out of the training of a quantizer, given entries of their own after it.

Some teachers emit about one frame in ten thousand with a huge value in one channel ("massive activations",
Sun et al., arXiv 2402.17762; whisper-tiny's residual stream does so near the ends of utterances).  Such a
frame has the energy of hundreds of others: alone it is half of the relative error of a batch, and gradient
steps, which move a center by the learning rate, never reach it.  The treatment is our design.
"""

import torch
from torch import Tensor

from icefall_kd.quantization.init import k_means
from icefall_kd.quantization.quantizer import SCALE_SPEED, Quantizer

# An outlier's squared distance from the mean is more than this many times the median one.
OUTLIER_ENERGY = 30.0
# More frames than this fraction are no outliers but what the teacher's frames are like.
LARGEST_FRACTION = 0.01
# Entries that outliers may take, all of one codebook.
MOST_ENTRIES = 4


def energies(frames: Tensor, rows: Tensor) -> Tensor:
    """Return the squared distances (len(rows),) float64 of the chosen frames from their mean."""
    total = sum(frames[part].double().sum(dim=0) for part in rows.split(16384))
    mean = total / max(1, len(rows))
    parts = [(frames[part].double() - mean).square().sum(dim=1) for part in rows.split(16384)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def outlier_mask(frames: Tensor, rows: Tensor) -> Tensor:
    """Return which of the chosen rows of frames (F, C) are outliers, (len(rows),) bool; none if too many would be."""
    energy = energies(frames, rows)
    if not len(energy):
        return torch.zeros(0, dtype=torch.bool)
    mask = energy > OUTLIER_ENERGY * energy.median()
    return mask if mask.sum() <= LARGEST_FRACTION * len(mask) else torch.zeros_like(mask)


@torch.no_grad()
def place_outliers(quantizer: Quantizer, outliers: Tensor, usual: Tensor, seed: int) -> int:
    """Give outliers the least used entries of one codebook; frames near the mean decode as before, all but a few.

    Args:
        quantizer: of centered frames; changed in place.
        outliers: (N, C) centered outliers.
        usual: (N2, C) centered frames that are none; they tell which entries are used least.
        seed: of the k-means clustering of more than ``MOST_ENTRIES`` outliers.
    Returns:
        How many entries the outliers took.
    """
    if not len(outliers):
        return 0
    outliers = outliers.float()
    if len(outliers) > MOST_ENTRIES:
        generator = torch.Generator().manual_seed(seed)
        outliers, _ = k_means(outliers, MOST_ENTRIES, 10, generator)
    size = quantizer.codebook_size
    count = min(len(outliers), size // 8)
    outliers = outliers[outliers.square().sum(dim=1).argsort(descending=True, stable=True)][:count]
    codes = quantizer.encode(usual, 1).long()
    used = torch.stack([torch.bincount(column, minlength=size) for column in codes.T])
    least = used.argsort(dim=1, stable=True)[:, :count]
    codebook = int(used.gather(1, least).sum(dim=1).argmin())
    entries = least[codebook]
    centers = quantizer.scaled_centers()
    # Frames of other codebooks' mean centers: the search makes the most of what remains.
    offset = centers.mean(dim=1).sum(dim=0) - centers[codebook].mean(dim=0)
    scale = (SCALE_SPEED * quantizer.centers_scale).exp()
    quantizer.centers[codebook, entries] = (outliers - offset) / scale
    # A linear classifier that beats the codebook's other entries on the far side of half the way to the outlier.
    energy = outliers.square().sum(dim=1, keepdim=True)
    weight = quantizer.to_logits.weight.view(quantizer.num_codebooks, size, -1)[codebook]
    bias = quantizer.to_logits.bias.view(quantizer.num_codebooks, size)[codebook]
    rest = torch.ones(size, dtype=torch.bool)
    rest[entries] = False
    logits_scale = (SCALE_SPEED * quantizer.logits_scale).exp()
    # Higher than any other entry at the outlier, lower than the best one at all usual frames.
    rivals = (logits_scale * outliers @ weight[rest].T + bias[rest]).amax(dim=1, keepdim=True)
    lowest = (logits_scale * usual.float() @ weight[rest].T + bias[rest]).amax(dim=1).min()
    height = 2 * torch.maximum(rivals.abs(), lowest.abs()) + 20
    weight[entries] = 2 * height * outliers / (energy * logits_scale)
    bias[entries] = -height.squeeze(1)
    return count
