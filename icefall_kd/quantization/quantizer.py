"""Multi-codebook ("direct sum") vector quantizer: an embedding becomes Q bytes.

Guo et al., "Predicting Multi-Codebook Vector Quantization Indexes for Knowledge Distillation",
arXiv 2211.00508.  An embedding is approximated by a sum of one center of each codebook; the indexes come
from a linear classifier and are then refined by the search of :mod:`icefall_kd.quantization.search`.
Model, losses and tensor names are those of multi_quantization 0.1.1, the authors' package, so that its
tensors load here; computation and files are our design.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icefall_kd.errors import ConfigError, DataError
from icefall_kd.quantization.search import SearchTables, refine
from icefall_kd.runtime.tensors import read_tensors, stated, write_tensors

# exp(10 s) gives the two global scales a ten times larger effective learning rate.
SCALE_SPEED = 10.0
FORMAT = "icefall_kd quantizer 1"
# What of a teacher's provenance decides which embeddings it gives; its device and precision do not.
TEACHER_FIELDS = (
    *("weights_sha256", "layer", "layer_convention", "input_normalization", "normalization"),
    *("conventions", "code_sha256"),  # of a state dict without a configuration, of a teacher of one's own
)


def check_teacher(trained: dict, provenance: dict, what: str) -> None:
    """Refuse a teacher whose embeddings something was not trained on.

    Args:
        trained: provenance of the teacher that it was trained on; {}: unknown, which fits all.
        provenance: of the teacher in question (teachers/base.py).
        what: was trained, for the message.
    Raises:
        DataError: they differ in one of ``TEACHER_FIELDS``; the message holds both values.
    """
    for name in TEACHER_FIELDS:
        if name in trained and trained[name] != provenance.get(name):
            raise DataError(
                f"the {what} was trained on a teacher whose {name} is {trained[name]!r}, this one's is "
                f"{provenance.get(name)!r}; use that teacher and layer, or train another {what}"
            )


@dataclass(frozen=True)
class QuantizerLosses:
    """The losses of a batch of frames; scalars, float32."""

    reconstruction: Tensor
    """Relative squared error ``|x^ - x|^2 / |x - mean|^2``: trains the centers."""
    logprob: Tensor
    """Mean negative log-probability of the refined indexes: trains the classifier."""
    entropy: Tensor
    """How far the mean class distribution is from uniform, 0 to 1, in units of ln K."""
    codes: Tensor
    """(N, Q) int64: the refined indexes."""

    def total(self, entropy_scale: float) -> Tensor:
        """Return the training loss."""
        return self.reconstruction + self.logprob + entropy_scale * self.entropy


class Quantizer(nn.Module):
    """Quantize embeddings (*, C) to ``num_codebooks`` indexes of ``codebook_size`` entries each.

    Args:
        dim: C, channels of an embedding.
        num_codebooks: Q, a power of two.
        codebook_size: K, a power of two up to 256.
    """

    def __init__(self, dim: int, num_codebooks: int, codebook_size: int = 256) -> None:
        super().__init__()
        for name, value in (("num_codebooks", num_codebooks), ("codebook_size", codebook_size)):
            if value < 1 or value & (value - 1):
                raise ConfigError(f"{name} of a quantizer is {value}; it must be a power of two")
        if codebook_size > 256:
            raise ConfigError(f"codebook_size of a quantizer is {codebook_size}; an index must fit a byte (256)")
        self.dim, self.num_codebooks, self.codebook_size = dim, num_codebooks, codebook_size
        self.to_logits = nn.Linear(dim, num_codebooks * codebook_size)
        self.logits_scale = nn.Parameter(torch.zeros(()))
        self.centers = nn.Parameter(self.to_logits.weight.detach().clone().view(num_codebooks, codebook_size, dim))
        self.centers_scale = nn.Parameter(torch.zeros(()))
        self.register_buffer("id_buf", torch.zeros(8, dtype=torch.uint8))
        self.metadata: dict = {}
        self._tables: tuple[tuple, SearchTables] | None = None
        self.stamp_id()

    def scaled_centers(self) -> Tensor:
        """Return the centers as they are summed, (Q, K, C)."""
        return self.centers * (SCALE_SPEED * self.centers_scale).exp()

    def mean(self) -> Tensor:
        """Return the mean of the data as the centers know it, (C,): exact when entries are equally used."""
        return self.scaled_centers().detach().mean(dim=1).sum(dim=0)

    def logits(self, x: Tensor) -> Tensor:
        """Return the classifier's logits (N, Q, K) of frames (N, C)."""
        # Scaled weights instead of scaled frames: then no gradient of the frames' size is needed for the scale.
        weight = (SCALE_SPEED * self.logits_scale).exp() * self.to_logits.weight
        return F.linear(x, weight, self.to_logits.bias).unflatten(1, (self.num_codebooks, self.codebook_size))

    def _sum_centers(self, codes: Tensor) -> Tensor:
        """Return the sum of chosen centers (N, C) of int64 codes (N, Q)."""
        first = torch.arange(self.num_codebooks, device=codes.device) * self.codebook_size
        scale = (SCALE_SPEED * self.centers_scale).exp()
        return scale * F.embedding_bag(codes + first, self.centers.flatten(0, 1), mode="sum")

    def decode(self, codes: Tensor) -> Tensor:
        """Return the embeddings (*, C) float32 that the indexes (*, Q) stand for; DataError for others."""
        if codes.shape[-1] != self.num_codebooks:
            raise DataError(f"codes have {codes.shape[-1]} codebooks, the quantizer has {self.num_codebooks}")
        flat = codes.reshape(-1, self.num_codebooks).to(self.centers.device, torch.int64)
        wrong = (flat < 0) | (flat >= self.codebook_size)
        if bool(wrong.any()):
            raise DataError(f"code {int(flat[wrong][0])} lies outside 0..{self.codebook_size - 1}: "
                            "the codes are padding, or of another quantizer")  # fmt: skip
        return self._sum_centers(flat).view(*codes.shape[:-1], self.dim)

    def tables(self) -> SearchTables:
        """Return the search tables of the present centers; made anew only when a parameter changed."""
        with torch.no_grad():
            key = tuple((p.data_ptr(), p._version, p.device) for p in (self.centers, self.centers_scale))
            if self._tables is None or self._tables[0] != key:
                self._tables = (key, SearchTables(self.scaled_centers()))
        return self._tables[1]

    @torch.no_grad()
    def encode(self, x: Tensor, refine_iters: int = 5, chunk_bytes: int | None = None) -> Tensor:
        """Return the indexes of embeddings.

        Args:
            x: (*, C) embeddings of any floating type; computed in float32.
            refine_iters: refinement searches after the classifier's choice.
            chunk_bytes: working memory of a chunk in bytes; None: 64 MiB on a CPU, 1 GiB on a GPU.
        Returns:
            (*, Q) uint8.
        Raises:
            DataError: ``x`` has another dimension, or values that are not finite.
        """
        self._check_dim(x)
        device = self.centers.device
        if chunk_bytes is None:
            chunk_bytes = 2**30 if device.type == "cuda" else 2**26
        width = self.num_codebooks * self.codebook_size
        rows = max(1, chunk_bytes // (4 * (3 * width + 2 * self.dim)))
        flat = x.reshape(-1, self.dim)
        out = torch.empty(len(flat), self.num_codebooks, dtype=torch.uint8, device=x.device)
        with torch.autocast(device.type, enabled=False):
            for start in range(0, len(flat), rows):
                frames = flat[start : start + rows].to(device, torch.float32)
                if not bool(frames.isfinite().all()):
                    row, channel = (~frames.isfinite()).nonzero()[0].tolist()
                    raise DataError(f"embedding {start + row} is {frames[row, channel]:g} in channel {channel}; "
                                    "check the teacher and its precision (--teacher-dtype)")  # fmt: skip
                codes = self.logits(frames).argmax(dim=-1)
                if refine_iters > 0:
                    tables = self.tables()
                    codes = refine(tables, tables.products(frames), codes, refine_iters, chunk_bytes)
                out[start : start + rows] = codes.to(x.device, torch.uint8)
        return out.view(*x.shape[:-1], self.num_codebooks)

    def losses(self, x: Tensor, refine_iters: int) -> QuantizerLosses:
        """Return the training losses of frames (N, C) with ``refine_iters`` refinement searches.

        The centers see only the reconstruction loss, the classifier only the other two.
        """
        x = x.float()
        logits = self.logits(x)
        if logits.requires_grad:
            # Subnormal numbers, of improbable entries, make a CPU's matrix products ten times slower.
            logits.register_hook(lambda grad: F.hardshrink(grad, 1e-30))
        with torch.no_grad():
            codes = logits.argmax(dim=-1)
            if refine_iters > 0:
                tables = SearchTables(self.scaled_centers())
                codes = refine(tables, tables.products(x), codes, refine_iters)
            variance = (x - self.mean()).square().sum()
        reconstruction = (self._sum_centers(codes) - x).square().sum() / (variance + 1e-20)
        logprobs = logits.log_softmax(dim=-1)
        logprob = -logprobs.gather(2, codes.unsqueeze(2)).mean()
        mean_probs = logprobs.exp().mean(dim=0)
        entropy = -(mean_probs * (mean_probs + 1e-20).log()).sum(dim=-1).mean()
        uniform = math.log(self.codebook_size)
        return QuantizerLosses(reconstruction, logprob, (uniform - entropy) / uniform, codes)

    @torch.no_grad()
    def relative_errors(self, x: Tensor, max_refine: int = 5) -> list[float]:
        """Return ``|x^ - x|^2 / |x - mean|^2`` of frames (N, C) after 0 to ``max_refine`` refinement searches."""
        self._check_dim(x)
        device = self.centers.device
        frames = x.reshape(-1, self.dim)
        mean, tables = frames.double().mean(dim=0).to(device), self.tables()
        errors, variance = [0.0] * (max_refine + 1), 0.0
        for part in frames.split(2048):
            part = part.to(device, torch.float32)
            variance += (part.double() - mean).square().sum().item()
            codes, products = self.logits(part).argmax(dim=-1), tables.products(part)
            for rounds in range(max_refine + 1):
                codes = refine(tables, products, codes, 1) if rounds else codes
                errors[rounds] += (self._sum_centers(codes) - part).double().square().sum().item()
        return [error / max(variance, 1e-20) for error in errors]

    def relative_error(self, x: Tensor, refine_iters: int = 5) -> float:
        """Return the relative error of frames (N, C) after ``refine_iters`` refinement searches."""
        return self.relative_errors(x, refine_iters)[-1]

    @torch.no_grad()
    def to_product(self) -> "Quantizer":
        """Return a quantizer of half as many codebooks of K*K entries: codebook c is the product of 2c and 2c+1.

        Entry ``k1 * K + k2`` is the sum of both centers, weights and biases, so decoded embeddings stay.
        """
        half, size = self.num_codebooks // 2, self.codebook_size
        if self.num_codebooks < 2 or size * size > 256:
            raise ConfigError(f"a quantizer of {self.num_codebooks} codebooks of {size} entries has no product form")

        def product(rows: Tensor) -> Tensor:
            pairs = rows.view(half, 2, size, -1)
            return (pairs[:, 0, :, None] + pairs[:, 1, None, :]).reshape(half, size * size, -1)

        result = Quantizer(self.dim, half, size * size).to(self.centers.device)
        result.centers.copy_(product(self.centers))
        result.to_logits.weight.copy_(product(self.to_logits.weight).flatten(0, 1))
        result.to_logits.bias.copy_(product(self.to_logits.bias).flatten())
        result.logits_scale.copy_(self.logits_scale)
        result.centers_scale.copy_(self.centers_scale)
        return result

    @property
    def sha256(self) -> str:
        """Return the hash of all parameters (names, shapes, float32 bytes): the identity of a label set's codes."""
        digest = hashlib.sha256()
        for name, value in sorted(self.named_parameters()):
            value = value.detach().to("cpu", torch.float32).contiguous()
            digest.update(f"{name} {tuple(value.shape)}\n".encode())
            digest.update(value.numpy().tobytes())
        return digest.hexdigest()

    def stamp_id(self) -> None:
        """Write the first 8 hexadecimal digits of :attr:`sha256` into ``id_buf``, the library's identity tag."""
        self.id_buf.copy_(torch.tensor(list(self.sha256[:8].encode()), dtype=torch.uint8))

    def save(self, path: str | Path, metadata: dict | None = None) -> None:
        """Write parameters and metadata (plain data) to one safetensors file, atomically."""
        if metadata is not None:
            self.metadata = metadata
        meta = {
            **self.metadata,
            "format": FORMAT,
            "dim": self.dim,
            "num_codebooks": self.num_codebooks,
            "codebook_size": self.codebook_size,
            "sha256": self.sha256,
        }
        write_tensors(path, self.state_dict(), {"metadata": json.dumps(meta, sort_keys=True)})

    @classmethod
    def load(cls, path: str | Path, dim: int | None = None, device: torch.device | str = "cpu") -> "Quantizer":
        """Read a quantizer that :meth:`save` wrote, or the state dict (.pt) of one of multi_quantization 0.1.1.

        Args:
            path: the file.
            dim: channels that the caller's embeddings have; None: not checked.
        Raises:
            DataError: the file is missing, damaged, or made for another dimension.
        """
        from icefall_kd.train.checkpoint import load_tensors  # late: this module is used without a training

        try:
            header, state = ({}, load_tensors(path)) if Path(path).suffix == ".pt" else read_tensors(path)
        except DataError as error:
            raise DataError(f"quantizer file {error}; train it with local/train_quantizer.py") from error
        result = cls.from_state_dict(state, where=str(path)).to(device)
        result.metadata = stated(header, path)
        stored = result.metadata.get("sha256")
        if header and stored != result.sha256:  # a state dict of the original package has no header
            raise DataError(f"quantizer file {path} is damaged: its header says sha256 {stored}, "
                            f"its tensors have {result.sha256}; train it again")  # fmt: skip
        if dim is not None and dim != result.dim:
            raise DataError(f"quantizer {path} was made for embeddings of {result.dim} channels, "
                            f"these have {dim}; use the teacher and layer it was trained on")  # fmt: skip
        return result

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor], where: str = "state dict") -> "Quantizer":
        """Return a quantizer with these tensors (ours or of multi_quantization 0.1.1); sizes come from ``centers``."""
        if "centers" not in state or state["centers"].ndim != 3 or not state["centers"].numel():
            raise DataError(f"{where} is no quantizer: it has no (Q, K, C) tensor 'centers', but {sorted(state)}")
        num_codebooks, codebook_size, dim = state["centers"].shape
        try:
            result = cls(dim, num_codebooks, codebook_size)
            result.load_state_dict(state)
        except (RuntimeError, ConfigError) as error:
            raise DataError(f"{where} is no quantizer of {tuple(state['centers'].shape)} centers: {error}") from error
        return result

    def check_teacher(self, provenance: dict) -> None:
        """Refuse a teacher whose embeddings this quantizer was not trained on.

        Args:
            provenance: of the teacher (teachers/base.py).  A quantizer whose file names no teacher fits all.
        Raises:
            DataError: it differs in one of ``TEACHER_FIELDS``; the message holds both values.
        """
        check_teacher(self.metadata.get("teacher", {}), provenance, "quantizer")

    def _check_dim(self, x: Tensor) -> None:
        if x.shape[-1] != self.dim:
            raise DataError(f"embeddings have {x.shape[-1]} channels, the quantizer was made for {self.dim}; "
                            "use the teacher and layer it was trained on")  # fmt: skip
