"""The losses and their gradients are on a GPU what they are on the CPU.

Without a GPU the comparisons run on the CPU alone, against float64 where the loss computes in it.
"""

import copy

import pytest
import torch
from torch import nn

from icefall_kd.data.batch import IGNORE
from icefall_kd.losses.codebook import CodebookLoss
from icefall_kd.losses.contrastive import contrastive_loss
from icefall_kd.losses.ctc import ctc_loss
from icefall_kd.losses.frame_kd import FrameKdLoss
from icefall_kd.losses.rnnt import pruned_transducer_loss
from icefall_kd.models.cif import integrate_and_fire
from icefall_kd.models.transducer import Joiner, StatelessDecoder

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.float64]
# Sums over frames and tokens in another order, in float32 and in float64.
TOLERANCE = {torch.float32: {"rtol": 1e-4, "atol": 1e-4}, torch.float64: {"rtol": 1e-9, "atol": 1e-9}}


def run(modules: nn.Module, loss, tensors: dict, inputs: tuple[str, ...], device: str) -> dict:
    """Return values and gradients, on the CPU, of a loss that is computed on a device.

    Args:
        modules: what holds the parameters; a copy of it is used.
        loss: maps modules and tensors to a tuple of losses.
        tensors: the arguments of the loss by name.
        inputs: names of those that get a gradient.
    """
    modules = copy.deepcopy(modules).to(device)
    tensors = {name: value.detach().to(device) for name, value in tensors.items()}
    for name in inputs:
        tensors[name].requires_grad_()
    values = loss(modules, **tensors)
    sum(value.sum() for value in values).backward()
    found = {f"loss {i}": value for i, value in enumerate(values)}
    found |= {f"gradient of {name}": tensors[name].grad for name in inputs}
    found |= {f"gradient of {name}": p.grad for name, p in modules.named_parameters()}
    assert all(value.device.type == device for value in found.values())
    return {name: value.detach().cpu() for name, value in found.items()}


def compare(found: dict, expected: dict, dtype: torch.dtype = torch.float32) -> None:
    """Assert that values agree to 1e-4 in float32 and to 1e-9 in float64."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(
            value.double(), expected[name].double(), **TOLERANCE[dtype], msg=lambda m, name=name: f"{name}: {m}"
        )


def transducer(modules, encoder_out, y, x_lens, y_lens, prune_range=50):
    decoder, joiner, am, lm = modules
    decoder_out = decoder(decoder.add_sos(y))
    return pruned_transducer_loss(
        encoder_out, decoder_out, joiner, am, lm, y, x_lens, y_lens, prune_range=prune_range, backend="torch"
    )


def transducer_case(dtype: torch.dtype) -> tuple[nn.Module, dict]:
    """Return modules and a ragged batch: a text longer than its audio, one frame, no text."""
    vocab, dim = 30, 16
    modules = nn.ModuleList(
        [StatelessDecoder(vocab, dim), Joiner(dim, dim, dim, vocab), nn.Linear(dim, vocab), nn.Linear(dim, vocab)]
    ).to(dtype)
    return modules, {
        "encoder_out": torch.randn(5, 40, dim, dtype=dtype),
        "y": torch.randint(1, vocab, (5, 12)),
        "x_lens": torch.tensor([40, 31, 3, 1, 20]),
        "y_lens": torch.tensor([12, 5, 7, 1, 0]),
    }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_transducer_loss_of_whole_lattices(device, dtype):
    # Windows as wide as the text: no choice of a window hangs on the last digit.
    modules, tensors = transducer_case(torch.float64)
    expected = run(modules, transducer, tensors, ("encoder_out",), "cpu")
    tensors["encoder_out"] = tensors["encoder_out"].to(dtype)
    compare(run(modules.to(dtype), transducer, tensors, ("encoder_out",), device), expected, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("prune_range", [2, 5])
def test_pruned_transducer_loss(device, prune_range):
    def loss(modules, **tensors):
        return transducer(modules, prune_range=prune_range, **tensors)

    modules, tensors = transducer_case(torch.float64)
    expected = run(modules, loss, tensors, ("encoder_out",), "cpu")
    compare(run(modules, loss, tensors, ("encoder_out",), device), expected, torch.float64)


@pytest.mark.parametrize("device", DEVICES)
def test_transducer_loss_under_bf16_autocast(device):
    def loss(modules, **tensors):
        with torch.autocast(device, torch.bfloat16):
            return transducer(modules, **tensors)

    modules, tensors = transducer_case(torch.float32)
    expected = run(modules, transducer, tensors, ("encoder_out",), "cpu")
    found = run(modules, loss, tensors, ("encoder_out",), device)
    for name in ("loss 0", "loss 1"):
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], expected[name], rtol=2e-2, atol=0.1)
    assert all(value.isfinite().all() for value in found.values())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ctc_loss(device, dtype):
    def loss(_, logits, y, x_lens, y_lens):
        return (ctc_loss(logits, y, x_lens, y_lens),)

    tensors = {
        "logits": torch.randn(4, 40, 30, dtype=torch.float64),
        "y": torch.randint(1, 30, (4, 12)),
        "x_lens": torch.tensor([40, 31, 2, 20]),
        "y_lens": torch.tensor([12, 5, 1, 0]),
    }
    expected = run(nn.Module(), loss, tensors, ("logits",), "cpu")
    tensors["logits"] = tensors["logits"].to(dtype)
    compare(run(nn.Module(), loss, tensors, ("logits",), device), expected, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("joint", [False, True])
def test_codebook_loss(device, joint, recompute):
    def loss(head, x, codes):
        result = head(x, codes)
        return result.value, result.per_utterance, result.per_target, result.counts, result.correct

    codes = torch.randint(0, 256, (4, 30, 16))
    codes[1, 17:], codes[2, 10, 8:], codes[2, 11:], codes[3] = IGNORE, IGNORE, IGNORE, IGNORE
    head = CodebookLoss(24, 16, joint=joint, joint_dim=32)
    tensors = {"x": torch.randn(4, 30, 24), "codes": codes}
    expected = run(head, loss, tensors, ("x",), "cpu")
    head.recompute = recompute
    compare(run(head, loss, tensors, ("x",), device), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_frame_kd_loss(device, kind):
    def loss(head, x, embeddings, mask):
        result = head(x, embeddings, mask)
        return result.value, result.per_utterance, result.per_target

    mask = torch.ones(3, 30, 2, dtype=torch.bool)
    mask[1, 17:], mask[2, 9, 1], mask[2, 10:] = False, False, False
    embeddings = torch.randn(3, 30, 40)
    embeddings[1, 17:] = float("nan")
    tensors = {"x": torch.randn(3, 30, 24), "embeddings": embeddings, "mask": mask}
    head = FrameKdLoss(24, 20, 2, kind)
    compare(run(head, loss, tensors, ("x",), device), run(head, loss, tensors, ("x",), "cpu"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scaled", [False, True])
def test_integrate_and_fire(device, dtype, scaled):
    def loss(_, encoder_out, alpha, lens, side):
        out = integrate_and_fire(encoder_out, alpha, lens if scaled else None)
        return out.c * side[:, : out.c.shape[1]], out.quantity, out.lens.to(out.c.dtype)

    tensors = {
        "encoder_out": torch.randn(4, 50, 8, dtype=torch.float64),
        "alpha": torch.rand(4, 50, dtype=torch.float64),
        "lens": torch.tensor([50, 31, 2, 20]),
        "side": torch.randn(4, 60, 8, dtype=torch.float64),
    }
    tensors["alpha"][3] *= 0.01
    expected = run(nn.Module(), loss, tensors, ("encoder_out", "alpha"), "cpu")
    for name in ("encoder_out", "alpha", "side"):
        tensors[name] = tensors[name].to(dtype)
    found = run(nn.Module(), loss, tensors, ("encoder_out", "alpha"), device)
    assert torch.equal(found["loss 2"].double(), expected["loss 2"])
    # Factors of hundreds enlarge what rounding leaves in the gradient of the weights.
    size = expected["gradient of alpha"].abs().max(dim=1, keepdim=True).values
    for values in (found, expected):
        values["gradient of alpha"] = values["gradient of alpha"].double() / size
    compare(found, expected, dtype)


@pytest.mark.parametrize("device", DEVICES)
def test_contrastive_loss(device):
    def loss(head, x, wanted):
        value, right = contrastive_loss(head(x), wanted, 0.1)
        return value, right.float()

    wanted = torch.randn(30, 16)
    wanted[20:] = wanted[:10]  # no negatives of each other
    tensors = {"x": torch.randn(30, 8), "wanted": wanted}
    head = nn.Linear(8, 16)
    compare(run(head, loss, tensors, ("x",), device), run(head, loss, tensors, ("x",), "cpu"))
