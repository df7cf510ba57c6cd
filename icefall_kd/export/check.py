"""Compare exported graphs with the model that they came from, on random input of many shapes."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from icefall_kd.errors import NumericError
from icefall_kd.export.graphs import Graph, log_mel_noise

Run = Callable[..., tuple[Tensor, ...]]

# Lengths of the batches that an offline encoder is checked with: odd and even, padded, the shortest, one frame alone.
BATCHES = ((7,), (8,), (11,), (64,), (203, 97, 8), (333,), (50, 121), (3, 40))
# Chunks that a streaming encoder is checked with, and one more.
CHUNKS = 6
# Largest difference of float32 outputs, relative to the largest output (at least 1).
TOLERANCE = 1e-4
# An int8 graph is another function; only what no longer resembles the model is refused: root mean square of the
# differences over that of the outputs.
INT8_TOLERANCE = 0.1


class _Errors:
    """The largest difference and the relative root mean square of one graph."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.largest = self.squares = self.reference = 0.0
        self.scale = 1.0

    def add(self, expected: Tensor, found: Tensor, where: str) -> None:
        if expected.shape != found.shape or expected.dtype != found.dtype:
            raise NumericError(
                f"the exported {self.name} returns {found.dtype} {tuple(found.shape)} for {where}, the model "
                f"{expected.dtype} {tuple(expected.shape)}; nothing was written"
            )
        if not expected.is_floating_point():
            if not torch.equal(expected, found):
                raise NumericError(
                    f"the exported {self.name} returns {found.tolist()} for {where}, the model {expected.tolist()}; "
                    "nothing was written"
                )
            return
        if not torch.isfinite(found).all():
            raise NumericError(f"the exported {self.name} returns non-finite numbers for {where}; nothing was written")
        if expected.numel():
            difference = (expected - found).double()
            self.largest = max(self.largest, difference.abs().max().item())
            self.scale = max(self.scale, expected.abs().max().item())
            self.squares += difference.square().sum().item()
            self.reference += expected.double().square().sum().item()

    def verdict(self, int8: bool) -> dict[str, float]:
        relative = (self.squares / self.reference) ** 0.5 if self.reference else 0.0
        limit, value = (INT8_TOLERANCE, relative) if int8 else (TOLERANCE * self.scale, self.largest)
        if not value <= limit:
            what = "relative root mean square" if int8 else "largest"
            raise NumericError(
                f"the exported {self.name} differs from the model: {what} difference {value:.2e}, at most {limit:.2e} "
                "is accepted; nothing was written"
            )
        return {"largest_difference": self.largest, "relative_rms_difference": relative}


@torch.no_grad()
def check_graph(graph: Graph, run: Run, cases: list[tuple[Tensor, ...]], int8: bool) -> dict[str, float]:
    """Compare one graph with its module on each of ``cases``.

    Outputs of an encoder beyond an utterance's length are not compared.

    Returns:
        largest_difference, and relative_rms_difference (root mean squares).
    Raises:
        NumericError: they differ in shapes, types, lengths, or by more than the tolerance.
    """
    errors = _Errors(graph.name)
    for inputs in cases:
        where = f"input of {', '.join(str(tuple(x.shape)) for x in inputs)}"
        expected = graph.module(*inputs)
        expected = expected if isinstance(expected, tuple) else (expected,)
        for one, other in zip(*(_valid(graph, inputs, out) for out in (expected, run(*inputs))), strict=True):
            errors.add(one, other, where)
    return errors.verdict(int8)


@torch.no_grad()
def check_encoder(encoder: nn.Module, other: nn.Module, exact: bool) -> dict[str, float]:
    """Compare two Conformers, without their front ends, on random input of the lengths of :data:`BATCHES`.

    Args:
        encoder: in the mode that counts.
        other: what was stored of it.
        exact: every bit must be equal; else what an int8 graph may differ by.
    Returns and raises as :func:`check_graph`.
    """
    errors = _Errors("encoder")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for lens in BATCHES:
            x, x_lens = torch.randn(len(lens), max(lens), encoder.dim), torch.tensor(lens)
            expected, found = (model.forward_embedded(x, x_lens).encoder_out for model in (encoder, other))
            errors.add(expected, found, f"input of {tuple(x.shape)}")
            if exact and not torch.equal(expected, found):
                raise NumericError(
                    f"the stored encoder differs from the model by {errors.largest:.2e}; nothing was written"
                )
    return errors.verdict(int8=True)


def _valid(graph: Graph, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Return what counts of a graph's outputs: the lengths that it states, and frames or tokens within them."""
    if graph.name in ("encoder", "ctc"):
        lens, rest = outputs[1], [*outputs[:1], *outputs[2:]]
        return [lens, *(x[i, :n] for x in rest for i, n in enumerate(lens))]
    if graph.name == "masked_decoder":
        return [x[i, :n] for x in outputs for i, n in enumerate(inputs[3])]
    return list(outputs)


@torch.no_grad()
def check_stream(graph: Graph, run: Run, feature_dim: int, int8: bool) -> dict[str, float]:
    """Compare a streaming encoder with its module over :data:`CHUNKS` chunks of two streams, one a chunk behind.

    Each side goes on from the caches that it made itself; the outputs and the last caches are compared.

    Returns and raises as :func:`check_graph`.
    """
    window, hop = graph.metadata["T"], graph.metadata["decode_chunk_len"]
    features = log_mel_noise(2, window + hop * CHUNKS, feature_dim)
    states = tuple(torch.zeros_like(x) for x in graph.example[1:3])
    expected = found = (None, *states)
    errors = _Errors(graph.name)
    for i in range(CHUNKS + 1):
        x, processed = features[:, i * hop : i * hop + window], torch.tensor([i * hop, max(i - 1, 0) * hop])
        if i == 1:  # the second stream begins with this chunk
            expected, found = (tuple(_forget_second(y) for y in out) for out in (expected, found))
        expected = graph.module(x, *expected[1:], processed)
        found = run(x, *found[1:], processed)
        errors.add(expected[0], found[0], f"chunk {i + 1}")
    for one, other in zip(expected[1:], found[1:], strict=True):
        errors.add(one, other, f"the caches after {CHUNKS + 1} chunks")
    return errors.verdict(int8)


def _forget_second(cache: Tensor) -> Tensor:
    if cache.dim() != 4:  # the output of the chunk before, not read again
        return cache
    return torch.stack([cache[:, :, 0], torch.zeros_like(cache[:, :, 1])], dim=2)


def offline_cases(feature_dim: int) -> list[tuple[Tensor, ...]]:
    """Return padded batches (x (N, T, F), x_lens (N,)) of the lengths of :data:`BATCHES`."""
    return [(log_mel_noise(len(lens), max(lens), feature_dim), torch.tensor(lens)) for lens in BATCHES]


def masked_cases(graph: Graph) -> list[tuple[Tensor, ...]]:
    """Return encoder output and tokens of several lengths, one token of one frame and a row without tokens too."""
    dim, mask_id = graph.example[0].shape[2], int(graph.example[2].max())
    cases = []
    for frames, tokens in (((1,), (1,)), ((9, 4), (3, 1)), ((25, 31, 8), (11, 6, 0)), ((50,), (7,))):
        n = len(frames)
        y = torch.randint(3, mask_id + 1, (n, max(tokens)))
        cases.append((torch.randn(n, max(frames), dim), torch.tensor(frames), y, torch.tensor(tokens)))
    return cases


def step_cases(graph: Graph) -> list[tuple[Tensor, ...]]:
    """Return random input of one step of a decoder with a cache, at the begin and later."""
    y, *vectors, keys, values = graph.example
    cases = []
    for n, u in ((1, 0), (3, 0), (2, 1), (4, 9), (1, 40)):
        past = [torch.randn(x.shape[0], n, x.shape[2], u, x.shape[4]) for x in (keys, values)]
        cases.append((torch.randint(0, int(y.max()) + 1, (n,)), *(torch.randn(n, v.shape[1]) for v in vectors), *past))
    return cases


def label_cases(graph: Graph) -> list[tuple[Tensor, ...]]:
    """Return random input of a decoder (with -1, the missing context) or of a joiner, for batches of 1, 2 and 7."""
    if graph.name == "joiner":
        return [tuple(torch.randn(n, x.shape[1]) for x in graph.example) for n in (1, 2, 7)]
    context, vocab_size = graph.example[0].shape[1], graph.metadata["vocab_size"]
    start = torch.tensor([[-1] * (context - 1) + [0]])
    return [(start,), *((torch.randint(-1, vocab_size, (n, context)),) for n in (2, 7, 64))]
