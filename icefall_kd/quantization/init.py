"""Start a quantizer from data instead of from random numbers (our design).

The principal components of the data are dealt out to the codebooks so that each gets about the same
log-variance (the eigenvalue allocation of Ge et al., "Optimized Product Quantization", CVPR 2013), and
each codebook starts with the k-means centers of its own subspace.  In a subspace the nearest center is a
linear classifier of the frame, so the classifier starts exactly as good as the centers.
"""

import torch
from torch import Tensor

from icefall_kd.quantization.quantizer import SCALE_SPEED, Quantizer


def allocate_components(variances: Tensor, num_codebooks: int) -> list[list[int]]:
    """Deal components out to codebooks of balanced log-variance.

    Args:
        variances: (C,) eigenvalues, in any order.
    Returns:
        For each codebook the components it owns; at most ceil(C / Q) each.
    """
    limit = -(-len(variances) // num_codebooks)
    owned: list[list[int]] = [[] for _ in range(num_codebooks)]
    load = [0.0] * num_codebooks
    # Log-variances relative to the smallest are never negative, so a larger load means more information.
    floor = variances.max().clamp(min=1e-30) * 1e-6
    logs = (variances.clamp(min=float(floor)) / floor).log().tolist()
    for component in sorted(range(len(logs)), key=lambda i: (-logs[i], i)):
        codebook = min((n for n in range(num_codebooks) if len(owned[n]) < limit), key=lambda n: (load[n], n))
        owned[codebook].append(component)
        load[codebook] += logs[component]
    return owned


def k_means(x: Tensor, size: int, iterations: int, generator: torch.Generator) -> tuple[Tensor, float]:
    """Return ``size`` centers (K, C) of frames (N, C) and the mean squared distance to them."""
    chosen = torch.randperm(len(x), generator=generator)[:size]
    if len(chosen) < size:
        chosen = chosen[torch.arange(size) % len(chosen)]
    centers = x[chosen].clone()
    for _ in range(iterations):
        distance = centers.square().sum(dim=1) - 2 * x @ centers.T
        nearest = distance.argmin(dim=1)
        count = torch.bincount(nearest, minlength=size)
        total = torch.zeros_like(centers).index_add_(0, nearest, x)
        used = count > 0
        centers[used] = total[used] / count[used].unsqueeze(1)
        if not used.all():
            # An unused center restarts at a frame, or it would stay unused.
            restart = torch.randint(len(x), (int((~used).sum()),), generator=generator)
            centers[~used] = x[restart]
    distance = centers.square().sum(dim=1) - 2 * x @ centers.T
    error = (distance.min(dim=1).values + x.square().sum(dim=1)).mean().item()
    return centers, max(error, 0.0)


@torch.no_grad()
def init_from_data(quantizer: Quantizer, x: Tensor, seed: int, iterations: int = 10) -> None:
    """Set centers and classifier of a quantizer from centered frames (N, C); some thousand are enough."""
    generator = torch.Generator().manual_seed(seed)
    x = x.float().cpu()
    covariance = (x.T.double() @ x.double()) / len(x)
    variances, basis = torch.linalg.eigh(covariance)
    size, dim = quantizer.codebook_size, quantizer.dim
    centers = torch.zeros(quantizer.num_codebooks, size, dim)
    weight, bias = torch.zeros_like(centers), torch.zeros(quantizer.num_codebooks, size)
    for n, components in enumerate(allocate_components(variances, quantizer.num_codebooks)):
        if not components:
            continue
        subspace = basis[:, components].float()
        part, error = k_means(x @ subspace, size, iterations, generator)
        centers[n] = part @ subspace.T
        # Log-odds of a mixture of spherical Gaussians around the centers.
        precision = len(components) / max(error, 1e-6)
        weight[n] = precision * centers[n]
        bias[n] = -0.5 * precision * part.square().sum(dim=1)
    # Adam moves every parameter at one speed, so weights of a common size, and the scales take up the rest.
    for scale, parameter, values in (
        (quantizer.centers_scale, quantizer.centers, centers),
        (quantizer.logits_scale, quantizer.to_logits.weight, weight.flatten(0, 1)),
    ):
        factor = values.square().mean().sqrt().clamp(min=1e-20) * (3 * dim) ** 0.5
        scale.copy_(factor.log() / SCALE_SPEED)
        parameter.copy_(values / factor)
    quantizer.to_logits.bias.copy_(bias.flatten())
