import math
import statistics

import pytest
import torch
from torch import nn

from icefall_kd.config import OptimConfig
from icefall_kd.errors import ConfigError
from icefall_kd.train.optim import ScaledAdam, build_optimizer, eden_lr, learning_rate


class ReferenceScaledAdam:
    """The published update, one parameter at a time, in plain Python over float64 lists."""

    def __init__(self, params, lr):
        self.p = [p.detach().flatten().tolist() for p in params]
        self.lr, self.n, self.norms, self.threshold = lr, 0, [], math.inf
        zeros = [[0.0] * len(p) for p in self.p]
        self.v, self.delta = [list(z) for z in zeros], [list(z) for z in zeros]
        self.rms = [self._rms(p) for p in self.p]
        self.vs, self.sg = [0.0] * len(self.p), [[0.0] * 4 for _ in self.p]

    @staticmethod
    def _rms(p):
        return math.sqrt(sum(x * x for x in p) / len(p))

    def step(self, grads):
        grads = [[float(x) for x in g.flatten()] for g in grads]
        weights = [0.1 if len(p) == 1 else r for p, r in zip(self.p, self.rms, strict=True)]
        norm = math.sqrt(sum((x * w) ** 2 for g, w in zip(grads, weights, strict=True) for x in g))
        self.norms.append(norm)
        if self.n > 0 and self.n % 100 == 0:
            self.threshold = 2.0 * statistics.median(self.norms[-100:])
        elif self.n in (10, 20, 40):
            self.threshold = 4.0 * statistics.median(self.norms)
        clip = min(1.0, self.threshold / norm)
        for i, g in enumerate(grads):
            self._update(i, [x * clip for x in g])
        self.n += 1

    def _update(self, i, g):
        p, n = self.p[i], self.n
        scalar = len(p) == 1
        d = [0.0] * len(p)
        if not scalar:
            self.sg[i][n % 4] = sum(a * b for a, b in zip(p, g, strict=True))
            if n % 4 == 3:
                rms = self.rms[i] = self._rms(p)
                b = 0.98**4
                self.vs[i] = b * self.vs[i] + (1 - b) * sum(s * s for s in self.sg[i]) / 4
                m = (n + 1) // 4
                ds = -self.lr * 0.1 * math.sqrt(1 - b**m) * sum(self.sg[i]) / (math.sqrt(self.vs[i]) + 1e-8)
                ds = 0.0 if rms < 1e-5 else max(-0.1, min(0.1, ds))
                ds = min(ds, (3 - rms) / rms)
                d = [x * ds for x in p]
        self.v[i] = [0.98 * v + 0.02 * x * x for v, x in zip(self.v[i], g, strict=True)]
        correction = 1 - 0.98 ** (n + 1)
        factor = 0.1 if scalar else max(self.rms[i], 1e-5)
        for j, x in enumerate(g):
            v = self.v[i][j] / correction if correction < 0.99 else self.v[i][j]
            d[j] -= self.lr * factor * x / (math.sqrt(v) + 1e-8)
        self.delta[i] = [0.9 * a + 0.1 * b for a, b in zip(self.delta[i], d, strict=True)]
        self.p[i] = [a + b for a, b in zip(p, self.delta[i], strict=True)]
        if scalar:
            self.p[i] = [max(-10.0, min(10.0, x)) for x in self.p[i]]


def make_params(dtype=torch.float64):
    g = torch.Generator().manual_seed(1)
    shapes = [(3, 2), (4,), (3, 2), (), (1,), (4,), ()]
    params = [nn.Parameter(torch.randn(s, generator=g, dtype=dtype)) for s in shapes]
    with torch.no_grad():
        params[2].mul_(2e-6)  # below the smallest size
        params[5].mul_(4.0)  # above the largest
    return params


def gradients(params, step):
    g = torch.Generator().manual_seed(step)
    scale = 50.0 if step in (15, 60, 110) else 1.0  # some are clipped
    return [scale * torch.randn(p.shape, generator=g, dtype=p.dtype) for p in params]


@pytest.mark.parametrize("max_stacked", [0, 10**6])
def test_scaled_adam_follows_the_published_update(monkeypatch, max_stacked):
    monkeypatch.setattr("icefall_kd.train.optim.MAX_STACKED_NUMEL", max_stacked)
    params = make_params()
    reference = ReferenceScaledAdam(params, lr=0.045)
    optimizer = ScaledAdam(params, lr=0.045)
    for step in range(210):
        grads = gradients(params, step)
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        optimizer.step()
        reference.step(grads)
        for p, expected in zip(params, reference.p, strict=True):
            torch.testing.assert_close(
                p.detach().flatten(), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12
            )
    assert reference.threshold < math.inf
    assert optimizer.last_grad_norm == pytest.approx(reference.norms[-1], rel=1e-9)


def test_scaled_adam_does_not_depend_on_the_scale_of_the_loss():
    ends = []
    for factor in (1.0, 1000.0):
        params = make_params()
        optimizer = ScaledAdam(params)
        for step in range(30):
            for p, grad in zip(params, gradients(params, step), strict=True):
                p.grad = factor * grad
            optimizer.step()
        ends.append(params)
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("name", ["scaled_adam", "adamw"])
def test_state_dict_continues_bit_equal(name):
    def run(split):
        model = nn.ParameterList(make_params(torch.float32))
        optimizer = build_optimizer(OptimConfig(optimizer=name), model)
        for step in range(23):
            if step == split:
                saved = optimizer.state_dict()
                optimizer = build_optimizer(OptimConfig(optimizer=name), model)
                optimizer.load_state_dict(saved)
            for p, grad in zip(model, gradients(list(model), step), strict=True):
                p.grad = grad
            optimizer.step()
        return [p.detach().clone() for p in model]

    for a, b in zip(run(None), run(13), strict=True):
        assert torch.equal(a, b)


def test_scaled_adam_leaves_everything_alone_when_a_gradient_is_not_finite():
    params = make_params()
    optimizer = ScaledAdam(params)
    for bad in (math.nan, math.inf):
        before = [p.detach().clone() for p in params]
        for p, grad in zip(params, gradients(params, 0), strict=True):
            p.grad = grad
        params[1].grad[2] = bad
        optimizer.step()
        assert not math.isfinite(optimizer.last_grad_norm)
        assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))
        assert optimizer.num_steps == 0


def test_missing_gradient_counts_as_zero():
    params = make_params()
    optimizer = ScaledAdam(params)
    params[0].grad = torch.ones_like(params[0])
    before = params[2].detach().clone()
    optimizer.step()
    assert torch.equal(params[2], before)


def test_scaled_adam_refuses_the_state_of_another_model():
    state = ScaledAdam(make_params()).state_dict()
    with pytest.raises(ConfigError, match="optimizer state"):
        ScaledAdam(make_params()[:3]).load_state_dict(state)


@pytest.mark.parametrize(
    ("step", "epoch", "expected"),
    [
        (0, 0, 0.0045),
        (500, 0, 0.04495),
        (5000, 0, 0.0410),
        (10000, 1, 0.0342),
        (50000, 5, 0.0131),
        (100000, 10, 0.00707),
        (300000, 29, 0.00246),
    ],
)
def test_eden_values(step, epoch, expected):
    assert eden_lr(0.045, step, epoch) == pytest.approx(expected, rel=5e-3)


def test_adamw_warms_up_linearly_and_decays_as_eden():
    config = OptimConfig(optimizer="adamw", base_lr=1e-3, lr_warmup_steps=100, lr_batches=1e9, lr_epochs=1e9)
    assert learning_rate(config, 0, 0) == pytest.approx(1e-5)
    assert learning_rate(config, 50, 0) == pytest.approx(1e-3 * (0.01 + 0.99 * 0.5))
    assert learning_rate(config, 100, 0) == pytest.approx(1e-3)


def test_weight_decay_is_for_matrices_alone():
    model = nn.Linear(3, 2)
    optimizer = build_optimizer(OptimConfig(optimizer="adamw", weight_decay=0.5), model)
    assert [(g["weight_decay"], [p.ndim for p in g["params"]]) for g in optimizer.param_groups] == [
        (0.5, [2]),
        (0.0, [1]),
    ]


def test_three_stages_of_the_planned_steps():
    options = {"lr_schedule": "tri_stage", "lr_stages": (0.1, 0.4, 0.5), "lr_final_scale": 0.05}
    config = OptimConfig(optimizer="adamw", base_lr=1e-3, **options)
    for step in range(1300):
        # The public code counts updates of whole stages: 100 up, 400 constant, 500 down, of 1000.
        if step < 100:
            expected = 1e-5 + (1e-3 - 1e-5) / 100 * step
        elif step < 500:
            expected = 1e-3
        elif step <= 1000:
            expected = 1e-3 * math.exp(math.log(0.05) / 500 * (step - 500))
        else:
            expected = 5e-5
        assert learning_rate(config, step, 3, planned=1000) == pytest.approx(expected, rel=1e-9)
    # A stage of no length is none.
    assert learning_rate(OptimConfig(lr_schedule="tri_stage", lr_stages=(0, 0, 1)), 0, 0, 10) == 0.045
    assert learning_rate(OptimConfig(lr_schedule="tri_stage", lr_stages=(0, 1, 0)), 9, 0, 10) == 0.045


def test_a_linear_schedule_rises_over_its_share_and_ends_at_nothing():
    config = OptimConfig(optimizer="adamw", base_lr=1.0, lr_schedule="linear", lr_stages=(0.2, 0.8, 0.0))
    rates = [learning_rate(config, step, 0, planned=10) for step in range(12)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0.0, 0.0])


def test_shares_that_are_none_are_refused():
    with pytest.raises(ConfigError, match=r"--lr-stages is \(0.5, 0.4, 0.5\)"):
        OptimConfig(lr_stages=(0.5, 0.4, 0.5))
    with pytest.raises(ConfigError, match=r"--lr-final-scale is 0.0; it must lie in \(0, 1\]"):
        OptimConfig(lr_final_scale=0.0)
