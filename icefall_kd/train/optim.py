"""Optimizers and learning-rate schedules.

The schedules are pure functions of the step and the epoch, so a resumed training needs no schedule state.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from icefall_kd.config import OptimConfig
from icefall_kd.errors import ConfigError

# Eden starts at this fraction of its rate and grows linearly during the warm-up.
EDEN_WARMUP_START = 0.1
# Larger tensors are not stacked on a CPU.
MAX_STACKED_NUMEL = 16384
# How many norms the clipping threshold of ScaledAdam looks back on.
CLIPPING_PERIOD = 100
# Early estimates of that threshold, from the few norms that exist by then.
EARLY_CLIPPING_STEPS = (10, 20, 40)


def eden_lr(
    base_lr: float,
    step: int,
    epoch: float,
    lr_batches: float = 7500.0,
    lr_epochs: float = 3.5,
    warmup_steps: int = 500,
    warmup_start: float = EDEN_WARMUP_START,
) -> float:
    """Return the learning rate of Eden (Yao et al. 2023, Zipformer, section 3.6).

    Args:
        base_lr: rate that the schedule starts from.
        step: global step, counted from 0.
        epoch: epoch, counted from 0.
        lr_batches, lr_epochs: where the rate starts to fall as the inverse square root.
        warmup_steps: steps of the linear warm-up; 0: none.
        warmup_start: factor at step 0.
    """
    decay = ((step**2 + lr_batches**2) / lr_batches**2) ** -0.25
    decay *= ((epoch**2 + lr_epochs**2) / lr_epochs**2) ** -0.25
    warmup = 1.0
    if step < warmup_steps:
        warmup = warmup_start + (1.0 - warmup_start) * step / warmup_steps
    return base_lr * decay * warmup


def tri_stage_lr(
    base_lr: float, step: int, planned: int, stages: Sequence[float], initial_scale: float, final_scale: float
) -> float:
    """Return the learning rate of the tri-stage schedule, as HuBERT and wav2vec 2.0 are fine-tuned with.

    From ``initial_scale`` of the rate linearly up, constant, then exponentially down to ``final_scale`` of it, where it
    stays (Baevski et al. 2020, arXiv 2006.11477, section 4.3, with the constants of the public code).

    Args:
        base_lr: the peak.
        step: global step, counted from 0.
        planned: steps of the whole training.
        stages: shares of the three stages, which add up to 1.
        initial_scale, final_scale: of the peak.
    """
    up, hold, down = (share * planned for share in stages)
    if step < up:
        return base_lr * (initial_scale + (1.0 - initial_scale) * step / up)
    if step <= up + hold:
        return base_lr
    return base_lr * final_scale ** (min((step - up - hold) / down, 1.0) if down else 1.0)


def linear_lr(base_lr: float, step: int, planned: int, warmup: float) -> float:
    """Return the rate that rises linearly over a share of the planned steps, then falls linearly to 0 at their end."""
    up = warmup * planned
    rising = (step + 1) / up if up else 1.0
    return base_lr * max(min(rising, (planned - step) / max(planned - up, 1.0), 1.0), 0.0)


def learning_rate(config: OptimConfig, step: int, epoch: int, planned: int | None = None) -> float:
    """Return the rate of global ``step`` (from 0) in ``epoch`` (from 0) for the configured optimizer.

    Args:
        config: optimizer and schedule.
        step, epoch: see above.
        planned: steps of the whole training; needed by the schedules of :func:`needs_plan`.
    """
    if config.lr_schedule == "tri_stage":
        scales = config.lr_initial_scale, config.lr_final_scale
        return tri_stage_lr(config.base_lr, step, planned, config.lr_stages, *scales)
    if config.lr_schedule == "linear":
        return linear_lr(config.base_lr, step, planned, config.lr_stages[0])
    # AdamW warms up from (almost) nothing, ScaledAdam from a tenth: its steps are relative to the parameters.
    start = EDEN_WARMUP_START if config.optimizer == "scaled_adam" else 1.0 / max(1, config.lr_warmup_steps)
    return eden_lr(config.base_lr, step, epoch, config.lr_batches, config.lr_epochs, config.lr_warmup_steps, start)


def needs_plan(config: OptimConfig) -> bool:
    """Return whether the schedule is one of shares of the planned steps."""
    return config.lr_schedule != "eden"


class _Stack:
    """Parameters of one shape, which are updated together as one tensor (B, *shape)."""

    def __init__(self, params: list[nn.Parameter], size_update_period: int) -> None:
        self.params = params
        self.scalar = params[0].numel() == 1
        stacked = self.stacked()
        self.dims = list(range(1, stacked.ndim))
        self.tensors = {"delta": torch.zeros_like(stacked), "exp_avg_sq": torch.zeros_like(stacked)}
        if not self.scalar:
            rms = self.rms(stacked)
            self.tensors["param_rms"] = rms
            self.tensors["scale_exp_avg_sq"] = torch.zeros_like(rms)
            # (B, period, 1, ..., 1)
            self.tensors["scale_grads"] = torch.stack([torch.zeros_like(rms)] * size_update_period, dim=1)

    def stacked(self) -> Tensor:
        """Return the parameters (B, *shape): a single one itself, several as a copy."""
        values = [p.detach() for p in self.params]
        return values[0].unsqueeze(0) if len(values) == 1 else torch.stack(values)

    def write_back(self, stacked: Tensor) -> None:
        """Give the parameters the values of a copy."""
        if len(self.params) > 1:
            torch._foreach_copy_(self.params, list(stacked.unbind(0)))

    def grads(self) -> Tensor:
        """Return the gradients (B, *shape); a missing one counts as zero."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        return grads[0].unsqueeze(0) if len(grads) == 1 else torch.stack(grads)

    def rms(self, stacked: Tensor) -> Tensor:
        """Return the root mean square of each parameter, (B, 1, ..., 1)."""
        return torch.linalg.vector_norm(stacked, dim=self.dims, keepdim=True) / (stacked[0].numel() ** 0.5)

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the inner products of two (B, *shape), as (B, 1, ..., 1)."""
        products = torch.bmm(a.reshape(len(a), 1, -1), b.reshape(len(b), -1, 1))
        return products.reshape(-1, *[1] * len(self.dims))


class ScaledAdam(torch.optim.Optimizer):
    """Adam whose steps are relative to the size of each parameter (Yao et al. 2023, section 3.5).

    The update is invariant to a constant factor in the loss, so the loss need not be normalised, and it learns the
    scale of each parameter explicitly.  Gradients are clipped to a multiple of the median of their recent norms.
    Parameters of equal shape are stacked and updated together, which matters for speed alone.

    Args:
        params: parameters to train.
        lr: learning rate, relative to the size of a parameter.
        clipping_scale: multiple of the median norm to which gradients are clipped; None: no clipping.
        betas, eps: as in Adam.
        scalar_lr_scale: factor on the rate of scalars and of the scale of each parameter.
        param_min_rms, param_max_rms: range of the sizes that the relative step works in.
        scalar_max: largest absolute value of a scalar parameter.
        size_update_period: steps between two updates of a parameter's scale.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 0.045,
        clipping_scale: float | None = 2.0,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
        scalar_lr_scale: float = 0.1,
        param_min_rms: float = 1e-5,
        param_max_rms: float = 3.0,
        scalar_max: float = 10.0,
        size_update_period: int = 4,
    ) -> None:
        super().__init__(list(params), {"lr": lr})
        if len(self.param_groups) != 1:
            raise ConfigError(f"ScaledAdam takes one list of parameters, got {len(self.param_groups)} groups")
        self.clipping_scale = clipping_scale
        self.betas = betas
        self.eps = eps
        self.scalar_lr_scale = scalar_lr_scale
        self.param_min_rms = param_min_rms
        self.param_max_rms = param_max_rms
        self.scalar_max = scalar_max
        self.size_update_period = size_update_period
        self.num_steps = 0
        self.last_grad_norm: float | None = None
        by_shape: dict[tuple, list[nn.Parameter]] = {}
        for i, p in enumerate(self.param_groups[0]["params"]):
            # On a CPU there are no launches to save, so large tensors are spared the copying.
            alone = i if p.device.type == "cpu" and p.numel() > MAX_STACKED_NUMEL else None
            by_shape.setdefault((tuple(p.shape), p.dtype, p.device, alone), []).append(p)
        self.stacks = [_Stack(ps, size_update_period) for ps in by_shape.values()]
        self.norms = [0.0] * CLIPPING_PERIOD
        self.threshold = math.inf

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Update the parameters; gradients with a non-finite norm leave parameters and state as they are.

        The size-weighted norm of the gradients before clipping is kept in ``last_grad_norm``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grads = [stack.grads() for stack in self.stacks]
        norm = self._norm(grads)
        self.last_grad_norm = norm
        if not math.isfinite(norm):
            return loss
        clip = self._clipping_factor(norm)
        for stack, grad in zip(self.stacks, grads, strict=True):
            if clip < 1.0:
                grad = grad * clip
            params = stack.stacked()
            if stack.scalar:
                self._step_scalar(stack, params, grad)
            else:
                self._step_tensor(stack, params, grad)
            stack.write_back(params)
        self.num_steps += 1
        return loss

    def _norm(self, grads: list[Tensor]) -> float:
        """Return the norm of the gradients, each weighted with the size of its parameter."""
        norms = []
        for stack, grad in zip(self.stacks, grads, strict=True):
            norm = torch.linalg.vector_norm(grad, dim=stack.dims or None, keepdim=True)
            weight = self.scalar_lr_scale if stack.scalar else stack.tensors["param_rms"]
            norms.append((norm * weight).flatten())
        return float(torch.linalg.vector_norm(torch.cat(norms)))

    def _clipping_factor(self, norm: float) -> float:
        """Record ``norm``, refresh the threshold when it is due and return the factor on the gradients."""
        if self.clipping_scale is None:
            return 1.0
        n = self.num_steps
        self.norms[n % CLIPPING_PERIOD] = norm
        if n > 0 and n % CLIPPING_PERIOD == 0:
            self.threshold = self.clipping_scale * statistics.median(self.norms)
        elif n in EARLY_CLIPPING_STEPS:
            # Few norms, from the steepest part of the training: twice as lenient.
            self.threshold = 2.0 * self.clipping_scale * statistics.median(self.norms[: n + 1])
        return min(1.0, self.threshold / (norm + 1e-20))

    def _add_adam_step(self, stack: _Stack, grad: Tensor, rate: Tensor | float) -> None:
        """Update the second moments and subtract ``rate * (1 - beta1) * g / (sqrt(v) + eps)`` from delta."""
        beta1, beta2 = self.betas
        exp_avg_sq = stack.tensors["exp_avg_sq"]
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
        correction = 1.0 - beta2 ** (self.num_steps + 1)
        root = correction**0.5 if correction < 0.99 else 1.0
        # g / (sqrt(v / c) + eps) = sqrt(c) g / (sqrt(v) + sqrt(c) eps), which saves a pass over the tensor
        direction = grad / exp_avg_sq.sqrt().add_(self.eps * root)
        if isinstance(rate, Tensor):
            stack.tensors["delta"].addcmul_(direction, rate, value=-(1.0 - beta1) * root)
        else:
            stack.tensors["delta"].add_(direction, alpha=-(1.0 - beta1) * root * rate)

    def _step_tensor(self, stack: _Stack, params: Tensor, grad: Tensor) -> None:
        lr, beta1 = self.param_groups[0]["lr"], self.betas[0]
        state, period = stack.tensors, self.size_update_period
        delta = state["delta"].mul_(beta1)
        state["scale_grads"][:, self.num_steps % period] = stack.dot(params, grad)
        if self.num_steps % period == period - 1:
            state["param_rms"].copy_(stack.rms(params))
            delta.addcmul_(params, self._scale_step(stack, lr), value=1.0 - beta1)
        self._add_adam_step(stack, grad, state["param_rms"].clamp(min=self.param_min_rms) * lr)
        params.add_(delta)

    def _scale_step(self, stack: _Stack, lr: float) -> Tensor:
        """Return the relative change of each parameter's size, (B, 1, ..., 1)."""
        state, period = stack.tensors, self.size_update_period
        beta2 = self.betas[1] ** period
        scale_grads, rms = state["scale_grads"], state["param_rms"]
        state["scale_exp_avg_sq"].mul_(beta2).add_(scale_grads.square().mean(dim=1), alpha=1.0 - beta2)
        correction = 1.0 - beta2 ** ((self.num_steps + 1) // period)
        denominator = state["scale_exp_avg_sq"].sqrt().add_(self.eps)
        step = -lr * self.scalar_lr_scale * correction**0.5 * scale_grads.sum(dim=1) / denominator
        step = step.masked_fill(rms < self.param_min_rms, 0.0).clamp(-0.1, 0.1)
        return torch.minimum(step, (self.param_max_rms - rms) / rms.clamp(min=1e-20))

    def _step_scalar(self, stack: _Stack, params: Tensor, grad: Tensor) -> None:
        stack.tensors["delta"].mul_(self.betas[0])
        self._add_adam_step(stack, grad, self.param_groups[0]["lr"] * self.scalar_lr_scale)
        params.add_(stack.tensors["delta"]).clamp_(-self.scalar_max, self.scalar_max)

    def state_dict(self) -> dict:
        """Return all state as plain containers: one dict of tensors a parameter, in their order."""
        by_param = {
            p: {name: t[i].clone() for name, t in stack.tensors.items()}
            for stack in self.stacks
            for i, p in enumerate(stack.params)
        }
        return {
            "lr": self.param_groups[0]["lr"],
            "num_steps": self.num_steps,
            "norms": list(self.norms),
            "threshold": self.threshold,
            "state": [by_param[p] for p in self.param_groups[0]["params"]],
        }

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore what :meth:`state_dict` returned for the same parameters in the same order."""
        params = self.param_groups[0]["params"]
        saved, own = [list(s["delta"].shape) for s in state_dict["state"]], [list(p.shape) for p in params]
        if saved != own:
            raise ConfigError(f"the optimizer state is for parameters of shapes {saved}, the model has {own}")
        self.param_groups[0]["lr"] = state_dict["lr"]
        self.num_steps = state_dict["num_steps"]
        self.norms, self.threshold = list(state_dict["norms"]), state_dict["threshold"]
        by_param = dict(zip(params, state_dict["state"], strict=True))
        for stack in self.stacks:
            for i, p in enumerate(stack.params):
                for name, tensor in stack.tensors.items():
                    tensor[i].copy_(by_param[p][name])


def build_optimizer(config: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Return the configured optimizer over the trainable parameters of ``model``."""
    params = [p for p in model.parameters() if p.requires_grad]
    if not params:
        raise ConfigError("the system has no trainable parameters")
    if config.optimizer == "scaled_adam":
        return ScaledAdam(params, lr=config.base_lr)
    # Weight decay pulls matrices alone: biases and gains of normalisation layers have no scale to lose.
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    return torch.optim.AdamW(groups, lr=config.base_lr, betas=(0.9, 0.98), eps=1e-8, foreach=True)
