"""Block masks: exact counts, the gradient law, and weights that are never lost."""

import itertools

import pytest
import torch
from torch import nn

from icefall_kd.errors import ConfigError
from icefall_kd.models.pruning import (
    PrunableLinear,
    actual_sparsity,
    block_mask,
    block_scores,
    compare_masks,
    global_masks,
    make_masks,
    sparse_size,
    sparsity_at,
)


def test_the_count_of_a_mask_is_exact():
    mask = block_mask(torch.randn(64, 48), 0.7, (8, 1))
    assert int(mask.sum()) == 928  # 384 blocks, int(268.8) of them pruned, 116 blocks of 8 kept
    assert int(block_mask(torch.ones(64, 48), 0.7, (8, 1)).sum()) == 928  # all blocks are equal
    assert block_mask(torch.randn(64, 48), 0.0).all() and not block_mask(torch.randn(64, 48), 1.0).any()
    # 0.29 * 100 lies below 29 in floating point
    assert int((~block_mask(torch.randn(10, 10), 0.29, (1, 1))).sum()) == 29


@pytest.mark.parametrize("block", [(8, 1), (1, 1), (1, 8), (16, 1), (4, 4)])
@pytest.mark.parametrize("shape", [(32, 16), (19, 11)])
def test_the_weakest_blocks_are_pruned_as_a_whole(block, shape):
    weight = torch.randn(shape)
    mask = block_mask(weight, 0.6, block)
    rows, columns = (range(0, n, b) for n, b in zip(shape, block, strict=True))
    kept, pruned = [], []
    for i, j in itertools.product(rows, columns):
        inside = slice(i, i + block[0]), slice(j, j + block[1])
        assert mask[inside].all() or not mask[inside].any()
        (kept if mask[inside].all() else pruned).append(float(weight[inside].abs().sum()))
    assert len(pruned) == int(0.6 * (len(kept) + len(pruned))) and max(pruned) <= min(kept) + 1e-5


def test_scores_of_squares_prefer_a_block_with_one_large_weight():
    weight = torch.tensor([[1.0, 2.0], [1.0, 0.0], [1.5, 2.0]])  # columns: sums 3.5 and 4, squares 4.25 and 8
    assert block_scores(weight, (3, 1), "l2")[0].tolist() == pytest.approx([4.25**0.5, 8**0.5])
    spread, spiky = torch.full((8, 1), 0.5), torch.tensor([[1.9]] + [[0.0]] * 7)
    pair = torch.cat([spread, spiky], dim=1)  # sums 4 and 1.9, norms 1.41 and 1.9
    assert block_mask(pair, 0.5, (8, 1)).all(dim=0).tolist() == [True, False]
    assert block_mask(pair, 0.5, (8, 1), "l2").all(dim=0).tolist() == [False, True]
    assert not global_masks([pair], 0.5, (8, 1), "l2")[0][:, 0].any()


def test_masks_of_a_higher_sparsity_are_nested():
    weight = torch.randn(40, 24)
    masks = [block_mask(weight, s) for s in (0.2, 0.5, 0.9)]
    assert all((high & ~low).sum() == 0 for low, high in itertools.pairwise(masks))


def test_global_ranking_is_blind_to_the_size_of_a_matrix_and_caps_each():
    first, second = torch.randn(64, 50), torch.randn(64, 50)
    small, large = global_masks([first * 1e-3, second * 1e3], 0.5)
    assert int((~small).sum() + (~large).sum()) == 8 * 400  # half of 800 blocks
    assert 0.4 < float(small.float().mean()) < 0.6
    assert torch.equal(global_masks([first, second], 0.5)[0], small)
    # A matrix whose blocks are all weak but for one row of blocks would vanish.
    spiky = torch.full((64, 50), 1e-3)
    spiky[:8] = 10.0
    masks = global_masks([spiky, torch.ones(64, 50)], 0.5)
    assert int((~masks[0]).sum()) <= 8 * int(0.95 * 400) and sum(int((~m).sum()) for m in masks) == 8 * 400
    alone = global_masks([spiky], 0.95)[0]
    assert int(alone.sum()) == 8 * 20


def test_the_schedule_is_cubic():
    ramp = [sparsity_at(step, 0.7, 100, 500) for step in (0, 100, 200, 300, 400, 500, 900)]
    assert ramp == pytest.approx([0, 0, 0.4047, 0.6125, 0.6891, 0.7, 0.7], abs=5e-5)
    assert sparsity_at(0, 0.7, 0, 0) == 0.7


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = (PrunableLinear.wrap(nn.Linear(8, 8).double()) for _ in range(2))

    def forward(self, x, sparse):
        for layer in (self.first, self.second):
            layer.sparse = sparse
        return self.second(torch.tanh(self.first(x)))


def losses(model, x, weight):
    """Return the losses of the dense and of the sparse mode."""
    return tuple((model(x, sparse) * weight).square().sum() for sparse in (False, True))


def finite_differences(loss, parameter, eps=1e-6):
    gradient = torch.zeros_like(parameter)
    with torch.no_grad():
        for i in range(parameter.numel()):
            flat = parameter.view(-1)
            kept = flat[i].item()
            flat[i] = kept + eps
            above = loss().item()
            flat[i] = kept - eps
            below = loss().item()
            flat[i] = kept
            gradient.view(-1)[i] = (above - below) / (2 * eps)
    return gradient


@pytest.mark.parametrize("straight_through", [False, True])
def test_the_gradient_is_the_dense_one_plus_the_masked_sparse_one(straight_through):
    model, scale = TwoLayers(), 0.7
    x, weight = torch.randn(5, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    for layer in (model.first, model.second):
        layer.mask, layer.straight_through = block_mask(layer.weight, 0.5, (2, 1)), straight_through
    dense, sparse = losses(model, x, weight)
    (dense + scale * sparse).backward()
    for layer in (model.first, model.second):
        # What an unconstrained sparse network would get: the derivative by the product W . M itself.
        product = (layer.weight * layer.mask).detach()
        others = {m: m.effective_weight().detach() for m in (model.first, model.second) if m is not layer}
        (other,) = others.values()
        weights = (product, other) if layer is model.first else (other, product)
        biases = model.first.bias, model.second.bias

        def of_product(weights=weights, biases=biases):
            y = torch.tanh(x @ weights[0].T + biases[0]) @ weights[1].T + biases[1]
            return (y * weight).square().sum()

        by_product = finite_differences(of_product, product)
        by_dense = finite_differences(lambda: losses(model, x, weight)[0], layer.weight.data)
        seen = by_product if straight_through else by_product * layer.mask
        torch.testing.assert_close(layer.weight.grad, by_dense + scale * seen, rtol=1e-5, atol=1e-6)
        assert int(layer.mask.sum()) == 32


def test_masked_weights_learn_on_in_the_dense_mode_and_are_never_zero():
    model = TwoLayers().float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for layer in (model.first, model.second):
        layer.mask = block_mask(layer.weight, 0.7, (2, 1))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    x, weight = torch.randn(5, 8), torch.randn(5, 8)
    for _ in range(100):
        optimizer.zero_grad()
        sum(losses(model, x, weight)).backward()
        optimizer.step()
    for name in ("first", "second"):
        layer = getattr(model, name)
        assert (layer.weight != 0).all()
        assert (layer.weight != before[f"{name}.weight"])[~layer.mask].all()
    dense = model(x, False)
    for layer in (model.first, model.second):
        layer.mask = ~layer.mask
    assert torch.equal(model(x, False), dense) and not torch.equal(model(x, True), dense)


def test_wrapping_keeps_parameters_and_draws_nothing():
    linear, x = nn.Linear(6, 12), torch.randn(3, 6)
    state = torch.get_rng_state()
    layer = PrunableLinear.wrap(linear, matrices=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert layer.weight is linear.weight and layer.bias is linear.bias and torch.equal(layer(x), linear(x))
    assert layer.state_dict().keys() == {"weight", "bias", "mask"} and layer.mask.all()
    with pytest.raises(ConfigError, match="5 matrices"):
        PrunableLinear.wrap(linear, matrices=5)


def test_stacked_matrices_are_ranked_by_themselves():
    layer = PrunableLinear(16, 48, matrices=3)
    with torch.no_grad():
        layer.weight[:16] *= 100
    masks = make_masks({"qkv": layer}, 0.5, (8, 1))
    assert [int(m.sum()) for m in masks["qkv"].chunk(3)] == [128, 128, 128]
    assert actual_sparsity(masks) == {"qkv": 0.5}


def test_churn_and_overlap():
    before = {"a": torch.tensor([[True, True, False, False]])}
    now = {"a": torch.tensor([[True, False, True, False]])}
    change = compare_masks(before, now)
    assert (change.churn, change.iou) == (0.5, pytest.approx(1 / 3))
    # What the schedule takes away is no churn.
    fewer = compare_masks(before, {"a": torch.tensor([[True, False, False, False]])})
    assert (fewer.churn, fewer.iou) == (0.0, 0.5)
    with pytest.raises(ConfigError, match="masks of different layers: a, b"):
        compare_masks(before, {"b": now["a"]})


def test_size_in_bytes():
    layer = PrunableLinear(48, 64)
    layer.mask = block_mask(layer.weight, 0.7)
    model = nn.Sequential(layer, nn.Linear(10, 10))
    size = sparse_size(model)
    assert (size.prunable, size.nonzeros, size.blocks, size.rest) == (3072, 928, 116, 64 + 110)
    assert size.sparse_bytes(1) == 928 * 1.25 + 174  # at one byte a weight the indexes add a quarter
    assert size.sparse_bytes(2) == 2 * 928 * 1.125 + 2 * 174
    assert size.dense_bytes(4) == 4 * (3072 + 174)
    assert block_scores(torch.ones(9, 5), (8, 2)).tolist() == [[16, 16, 8], [2, 2, 1]]
