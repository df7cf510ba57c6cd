"""What a label set holds: its provenance, and how arrays of the teacher become rows of it (our design)."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from icefall_kd.config import ExtractConfig
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.labels.info import RECOGNISER_ROWS, LabelSetInfo
from icefall_kd.quantization.clusters import Clusters
from icefall_kd.quantization.quantizer import Quantizer
from icefall_kd.teachers.base import Teacher

# Turns arrays [(T_l, C)] of some utterances into what is stored of each, [(rows, width)].
RowMaker = Callable[[Sequence[Tensor]], list[np.ndarray]]

_FLOAT16_MAX = 65504.0


def set_info(
    config: ExtractConfig,
    teacher: Teacher,
    quantizer: Quantizer | Clusters | None,
    corpus: str,
    layer: int | None = None,
) -> LabelSetInfo:
    """Return the provenance of the label set that ``config`` describes, of the teacher's own or another layer.

    Raises:
        ConfigError: the quantizer is for embeddings of another size, or the teacher is no recogniser.
        DataError: the quantizer was trained on another teacher, layer or normalisation.
    """
    stated = dict(teacher.provenance())
    if layer is not None:
        stated["layer"] = layer
    values = _values(config, teacher, quantizer, stated)
    taken = {
        "teacher_sha256": stated.pop("weights_sha256"),
        "layer": stated.pop("layer"),
        "layer_convention": stated.pop("layer_convention"),
        "normalization": stated.pop("normalization"),
        "teacher_dtype": stated.pop("dtype"),
        "device": stated.pop("device"),
    }
    stated.pop("frame_formula", None)
    origin = {name: stated.pop(name) for name in ("source", "versions", "layer_elsewhere") if name in stated}
    return LabelSetInfo(
        kind=config.kind,
        dim=teacher.dim,
        teacher=str(stated.pop("teacher", stated.get("family", type(teacher).__name__))),
        frame_formula=teacher.frame_formula.to_dict(),
        sampling_rate=teacher.sampling_rate,
        long_utterances=stated.pop("long_utterances", "unlimited" if teacher.max_samples is None else "reject"),
        corpus_fingerprint=corpus,
        extra={k: v for k, v in stated.items() if k != "dim"},
        origin=origin,
        **taken,
        **values,
    )


def load_quantizer(config: ExtractConfig) -> Quantizer | Clusters | None:
    """Read what turns embeddings into labels of the kind of ``config``; None: nothing does."""
    if config.quantizer is None:
        return None
    return (Clusters if config.kind == "clusters" else Quantizer).load(config.quantizer)


def _values(config: ExtractConfig, teacher: Teacher, quantizer: Quantizer | Clusters | None, stated: dict) -> dict:
    """Return dtype, width and what belongs to the kind; a recogniser's kinds say more in ``stated``."""
    if config.kind in RECOGNISER_ROWS:
        if not hasattr(teacher, "row_format"):
            raise ConfigError(
                f"a {type(teacher).__name__} gives no {config.kind}; --teacher must be an exp_dir trained with "
                "--system nar --attention-decoder ar"
            )
        made = teacher.row_format(config.kind)
        stated.update({"layer": None, "layer_convention": made.convention, **made.extra})
        return {"dtype": made.dtype, "width": made.width}
    if config.kind == "embeddings":
        return {"dtype": config.embeddings_dtype, "width": teacher.dim}
    if quantizer.dim != teacher.dim:
        raise ConfigError(f"the quantizer is for embeddings of {quantizer.dim}, the teacher's have {teacher.dim}")
    quantizer.check_teacher(stated)
    made = {
        "width": quantizer.num_codebooks,
        "num_codebooks": quantizer.num_codebooks,
        "codebook_size": quantizer.codebook_size,
        "quantizer_sha256": quantizer.sha256,
    }
    if config.kind == "clusters":
        return {"dtype": "uint16", **made}
    return {"dtype": "uint8", **made, "refine_iters": config.refine_iters}


def row_maker(config: ExtractConfig, quantizer: Quantizer | Clusters | None, dtype: str) -> RowMaker:
    """Return what makes the rows of the label set of ``config``.

    Args:
        config: its kind and options.
        quantizer: of codebook_indexes or clusters.
        dtype: type of the set.
    """
    if config.kind == "codebook_indexes":
        quantizer.eval()

        def convert(joined: Tensor) -> np.ndarray:
            quantizer.to(joined.device)
            return quantizer.encode(joined, refine_iters=config.refine_iters).cpu().numpy()

    elif config.kind == "clusters":

        def convert(joined: Tensor) -> np.ndarray:
            return quantizer.encode(joined).cpu().numpy().astype(dtype)

    else:

        def convert(joined: Tensor) -> np.ndarray:
            if dtype == "float16" and float(joined.abs().max()) > _FLOAT16_MAX:
                raise DataError(
                    f"an embedding reaches {float(joined.abs().max()):.4g}, float16 holds {_FLOAT16_MAX}; "
                    "choose --embeddings-dtype float32 or --normalize-embeddings true"
                )
            return joined.cpu().numpy().astype(dtype)  # of a recogniser: its rows, which fit by their making

    def make(arrays: Sequence[Tensor]) -> list[np.ndarray]:
        return np.split(convert(torch.cat(list(arrays))), np.cumsum([len(a) for a in arrays])[:-1])

    return make
