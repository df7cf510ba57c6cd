"""Which library computes the pruned transducer loss: k2, fast_rnnt or our own code."""

from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch

from icefall_kd.errors import ConfigError
from icefall_kd.runtime.optional import Probe, broken, probe_import

# In the order in which "auto" tries them.
OUTSIDE = ("k2", "fast_rnnt")
# What a library must offer; both name these alike.
_FUNCTIONS = ("rnnt_loss_smoothed", "get_rnnt_prune_ranges", "do_rnnt_pruning", "rnnt_loss_pruned")


@dataclass(frozen=True)
class Backend:
    """A way to compute the loss."""

    name: str
    """torch, k2 or fast_rnnt."""
    module: ModuleType | None
    """The library; None for our own code."""


@cache
def probe(name: str, device: str = "cpu") -> Probe:
    """Import a library once and say whether it works on a device; a broken one is named in a warning, once.

    Args:
        name: "k2" or "fast_rnnt".
        device: type of the tensors; a k2 that was built without CUDA imports, and fails at the first loss.
    """
    found = probe_import(name)
    module = found.module
    if module is None:
        return found
    missing = [function for function in _FUNCTIONS if not hasattr(module, function)]
    if missing:
        return broken(name, f"it lacks {', '.join(missing)}")
    try:
        _try(module, device)
    except Exception as error:  # as at import, anything
        return broken(name, f"on {device}: {type(error).__name__}: {error}".splitlines()[0])
    return Probe(module)


def load_backend(name: str, device: str = "cpu") -> Backend:
    """Return the backend of a name; "auto" takes the first of k2, fast_rnnt and torch that works.

    Args:
        name: auto, torch, k2 or fast_rnnt.
        device: type of the tensors that it gets ("cpu", "cuda").
    Raises:
        ConfigError: for an unknown name, or for a library that is absent or broken.
    """
    if name == "torch":
        return Backend("torch", None)
    if name == "auto":
        working = ((outside, probe(outside, device).module) for outside in OUTSIDE)
        return next((Backend(n, module) for n, module in working if module is not None), Backend("torch", None))
    if name not in OUTSIDE:
        raise ConfigError(f"--rnnt-backend is {name!r}; choose auto, torch, {' or '.join(OUTSIDE)}")
    found = probe(name, device)
    if found.module is None:
        raise ConfigError(f"--rnnt-backend {name} cannot be used: {found.reason}; use auto or torch")
    return Backend(name, found.module)


def _try(module: ModuleType, device: str) -> None:
    """Compute the losses of one token in two frames."""
    am, lm = torch.zeros(1, 2, 3, device=device), torch.zeros(1, 2, 3, device=device)
    boundary = torch.tensor([[0, 0, 1, 2]], device=device)
    common = {
        "symbols": torch.ones(1, 1, dtype=torch.int64, device=device),
        "termination_symbol": 0,
        "boundary": boundary,
        "reduction": "none",
    }
    _, (px_grad, py_grad) = module.rnnt_loss_smoothed(
        lm=lm, am=am, lm_only_scale=0.25, am_only_scale=0.0, return_grad=True, **common
    )
    ranges = module.get_rnnt_prune_ranges(px_grad=px_grad, py_grad=py_grad, boundary=boundary, s_range=2)
    am, lm = module.do_rnnt_pruning(am=am, lm=lm, ranges=ranges)
    module.rnnt_loss_pruned(logits=am + lm, ranges=ranges, **common)
