"""Clusters of a teacher's embeddings: the hidden units that HuBERT predicts (Hsu et al. 2021, arXiv 2106.07447)."""

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor

from icefall_kd.errors import DataError
from icefall_kd.quantization.quantizer import check_teacher
from icefall_kd.runtime.tensors import read_tensors, stated, write_tensors

FORMAT = "icefall_kd clusters 1"
_CHUNK = 1 << 16


class Clusters:
    """Number embeddings (*, C) by the nearest of K centres; to a label set it is a quantizer of one codebook.

    Args:
        centers: (K, C).
        metadata: plain data on the training; ``teacher`` is the teacher's provenance.
    """

    num_codebooks = 1

    def __init__(self, centers: Tensor, metadata: dict | None = None) -> None:
        self.centers = centers.detach().to("cpu", torch.float32).contiguous()
        self.metadata = metadata or {}

    @property
    def codebook_size(self) -> int:
        """Return K."""
        return self.centers.shape[0]

    @property
    def dim(self) -> int:
        """Return C."""
        return self.centers.shape[1]

    @property
    def sha256(self) -> str:
        """Return the hash of the centres: the identity of the numbers that they give."""
        digest = hashlib.sha256(f"centers {tuple(self.centers.shape)}\n".encode())
        digest.update(self.centers.numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Return the number of the nearest centre of each frame (Euclidean distance in float32).

        Args:
            x: (F, C) embeddings of any floating type.
        Returns:
            (F, 1) int64; the lower number where two centres are equally near.
        Raises:
            DataError: values that are not finite, or another number of channels.
        """
        if x.shape[-1] != self.dim:
            raise DataError(f"embeddings have {x.shape[-1]} channels, the clusters' {self.dim}")
        centers = self.centers.to(x.device)
        found = []
        with torch.autocast(x.device.type, enabled=False):
            half = centers.square().sum(dim=1) / 2
            for frames in x.float().split(_CHUNK):
                if not bool(frames.isfinite().all()):
                    raise DataError("embeddings are not finite; check the teacher and its precision (--teacher-dtype)")
                # |x - c|^2 / 2 without |x|^2 / 2, which all centres have.
                found.append((half - frames @ centers.T).argmin(dim=1))
        return torch.cat(found).unsqueeze(1) if found else torch.zeros(0, 1, dtype=torch.int64)

    def check_teacher(self, provenance: dict) -> None:
        """Refuse a teacher whose embeddings these clusters were not made of; see quantizer.check_teacher."""
        check_teacher(self.metadata.get("teacher", {}), provenance, "set of clusters")

    def save(self, path: str | Path) -> None:
        """Write centres and metadata to a safetensors file, atomically."""
        meta = {**self.metadata, "format": FORMAT, "sha256": self.sha256}
        write_tensors(path, {"centers": self.centers}, {"metadata": json.dumps(meta, sort_keys=True)})

    @classmethod
    def load(cls, path: str | Path) -> "Clusters":
        """Read what :meth:`save` wrote.

        Raises:
            DataError: the file is missing, damaged, or holds something else.
        """
        try:
            header, tensors = read_tensors(path)
        except DataError as error:
            raise DataError(f"clusters {error}; make them with local/train_kmeans.py") from error
        metadata = stated(header, path)
        if metadata.get("format") != FORMAT or "centers" not in tensors or tensors["centers"].ndim != 2:
            raise DataError(f"{path} holds no clusters of local/train_kmeans.py, but {sorted(tensors)}")
        result = cls(tensors["centers"], metadata)
        if metadata.get("sha256") != result.sha256:
            raise DataError(f"{path} is damaged: its header says sha256 {metadata.get('sha256')}; make it again")
        return result
