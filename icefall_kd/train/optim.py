"""Optimizers and learning-rate schedules.

The schedules are pure functions of the step and the epoch, so a resumed training needs no schedule state.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from icefall_kd.config import OptimConfig
from icefall_kd.errors import ConfigError

# Eden starts at this fraction of its rate and grows linearly during the warm-up.
EDEN_WARMUP_START = 0.1
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


def learning_rate(config: OptimConfig, step: int, epoch: int) -> float:
    """Return the rate of global ``step`` (from 0) in ``epoch`` (from 0) for the configured optimizer."""
    # AdamW warms up from (almost) nothing, ScaledAdam from a tenth: its steps are relative to the parameters.
    start = EDEN_WARMUP_START if config.optimizer == "scaled_adam" else 1.0 / max(1, config.lr_warmup_steps)
    return eden_lr(config.base_lr, step, epoch, config.lr_batches, config.lr_epochs, config.lr_warmup_steps, start)


class _Stack:
    """Parameters of one shape, which are updated together as one tensor (B, *shape)."""

    def __init__(self, params: list[nn.Parameter], size_update_period: int) -> None:
        self.params = params
        self.scalar = params[0].numel() == 1
        stacked = torch.stack([p.detach() for p in params])  # (B, *shape)
        self.dims = list(range(1, stacked.ndim))
        self.tensors = {"delta": torch.zeros_like(stacked), "exp_avg_sq": torch.zeros_like(stacked)}
        if not self.scalar:
            rms = self.rms(stacked)
            self.tensors["param_rms"] = rms
            self.tensors["scale_exp_avg_sq"] = torch.zeros_like(rms)
            self.tensors["scale_grads"] = rms.new_zeros(size_update_period, *rms.shape)

    def rms(self, stacked: Tensor) -> Tensor:
        """Return the root mean square of each parameter, (B, 1, ..., 1)."""
        return stacked.square().mean(dim=self.dims, keepdim=True).sqrt()

    def grads(self) -> Tensor:
        """Return the gradients (B, *shape); a missing one counts as zero."""
        return torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in self.params])


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
        self.last_grad_norm: Tensor | None = None
        by_shape: dict[tuple, list[nn.Parameter]] = {}
        for p in self.param_groups[0]["params"]:
            if p.requires_grad:
                by_shape.setdefault((tuple(p.shape), p.dtype, p.device), []).append(p)
        self.stacks = [_Stack(ps, size_update_period) for ps in by_shape.values()]
        first = next(iter(by_shape.values()))[0]
        self.norms = torch.zeros(CLIPPING_PERIOD, device=first.device)
        self.threshold = torch.full((), float("inf"), device=first.device)

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
        if not torch.isfinite(norm):
            return loss
        clip = self._clipping_factor(norm)
        for stack, grad in zip(self.stacks, grads, strict=True):
            grad.mul_(clip)
            params = torch.stack(stack.params)
            if stack.scalar:
                self._step_scalar(stack, params, grad)
            else:
                self._step_tensor(stack, params, grad)
            torch._foreach_copy_(stack.params, list(params.unbind(0)))
        self.num_steps += 1
        return loss

    def _norm(self, grads: list[Tensor]) -> Tensor:
        """Return the norm of the gradients, each weighted with the size of its parameter."""
        sums = []
        for stack, grad in zip(self.stacks, grads, strict=True):
            weight = self.scalar_lr_scale if stack.scalar else stack.tensors["param_rms"]
            sums.append((grad * weight).square().sum().to(self.norms.device, torch.float32))
        return torch.stack(sums).sum().sqrt()

    def _clipping_factor(self, norm: Tensor) -> Tensor:
        """Record ``norm``, refresh the threshold when it is due and return the factor on the gradients."""
        if self.clipping_scale is None:
            return norm.new_ones(())
        n = self.num_steps
        self.norms[n % CLIPPING_PERIOD] = norm
        if n > 0 and n % CLIPPING_PERIOD == 0:
            self.threshold = self.clipping_scale * self.norms.quantile(0.5)
        elif n in EARLY_CLIPPING_STEPS:
            # Few norms, from the steepest part of the training: twice as lenient.
            self.threshold = 2.0 * self.clipping_scale * self.norms[: n + 1].quantile(0.5)
        return (self.threshold / (norm + 1e-20)).clamp(max=1.0)

    def _adam_direction(self, stack: _Stack, grad: Tensor) -> Tensor:
        """Update the second moments and return ``g / (sqrt(v) + eps)``."""
        beta2 = self.betas[1]
        exp_avg_sq = stack.tensors["exp_avg_sq"]
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
        correction = 1.0 - beta2 ** (self.num_steps + 1)
        denominator = (exp_avg_sq / correction).sqrt_() if correction < 0.99 else exp_avg_sq.sqrt()
        return grad / denominator.add_(self.eps)

    def _step_tensor(self, stack: _Stack, params: Tensor, grad: Tensor) -> None:
        lr, beta1 = self.param_groups[0]["lr"], self.betas[0]
        state, period = stack.tensors, self.size_update_period
        delta = state["delta"].mul_(beta1)
        state["scale_grads"][self.num_steps % period] = (params * grad).sum(dim=stack.dims, keepdim=True)
        if self.num_steps % period == period - 1:
            state["param_rms"].copy_(stack.rms(params))
            delta.add_(params * self._scale_step(stack, lr), alpha=1.0 - beta1)
        size = state["param_rms"].clamp(min=self.param_min_rms)
        delta.add_(self._adam_direction(stack, grad).mul_(size), alpha=-lr * (1.0 - beta1))
        params.add_(delta)

    def _scale_step(self, stack: _Stack, lr: float) -> Tensor:
        """Return the relative change of each parameter's size, (B, 1, ..., 1)."""
        state, period = stack.tensors, self.size_update_period
        beta2 = self.betas[1] ** period
        scale_grads, rms = state["scale_grads"], state["param_rms"]
        state["scale_exp_avg_sq"].mul_(beta2).add_(scale_grads.square().mean(dim=0), alpha=1.0 - beta2)
        correction = 1.0 - beta2 ** ((self.num_steps + 1) // period)
        denominator = state["scale_exp_avg_sq"].sqrt().add_(self.eps)
        step = -lr * self.scalar_lr_scale * correction**0.5 * scale_grads.sum(dim=0) / denominator
        step = step.masked_fill(rms < self.param_min_rms, 0.0).clamp(-0.1, 0.1)
        return torch.minimum(step, (self.param_max_rms - rms) / rms.clamp(min=1e-20))

    def _step_scalar(self, stack: _Stack, params: Tensor, grad: Tensor) -> None:
        lr, beta1 = self.param_groups[0]["lr"] * self.scalar_lr_scale, self.betas[0]
        delta = stack.tensors["delta"].mul_(beta1)
        delta.add_(self._adam_direction(stack, grad), alpha=-lr * (1.0 - beta1))
        params.add_(delta).clamp_(-self.scalar_max, self.scalar_max)

    def state_dict(self) -> dict:
        """Return all state as plain containers of tensors and numbers."""
        return {
            "lr": self.param_groups[0]["lr"],
            "num_steps": self.num_steps,
            "norms": self.norms.clone(),
            "threshold": self.threshold.clone(),
            "shapes": [[len(s.params), *s.params[0].shape] for s in self.stacks],
            "stacks": [{name: t.clone() for name, t in s.tensors.items()} for s in self.stacks],
        }

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore what :meth:`state_dict` returned for the same parameters in the same order."""
        shapes = [[len(s.params), *s.params[0].shape] for s in self.stacks]
        if [list(s) for s in state_dict["shapes"]] != shapes:
            raise ConfigError(f"optimizer state is for parameters {state_dict['shapes']}, the model has {shapes}")
        self.param_groups[0]["lr"] = state_dict["lr"]
        self.num_steps = state_dict["num_steps"]
        self.norms = state_dict["norms"].clone().to(self.norms.device)
        self.threshold = state_dict["threshold"].clone().to(self.threshold.device)
        for stack, saved in zip(self.stacks, state_dict["stacks"], strict=True):
            for name, tensor in stack.tensors.items():
                tensor.copy_(saved[name])


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
