"""A Shar small enough for tests, and what it was made of."""

from pathlib import Path

from micro_corpus import label_info, read_cuts, write_labels

from icefall_kd.config import SharConfig
from icefall_kd.data.shar_export import export_shar
from icefall_kd.systems.base import LabelSpec


def write_label_sets(corpus: Path) -> tuple[Path, Path]:
    """Write codes of all training cuts and embeddings of all but two of them; return the folders."""
    cuts = list(read_cuts(corpus))
    embeddings = label_info(kind="embeddings", dtype="float16", width=8, num_codebooks=None, codebook_size=None,
                            quantizer_sha256=None)  # fmt: skip
    codes = write_labels(corpus / "codes", cuts, num_shards=2)
    return codes, write_labels(corpus / "embeddings", cuts[:-2], embeddings)


def write_shar(corpus: Path, name="shar", num_shards=4, part="train", **options) -> Path:
    """Write the training cuts with features and audio, and their labels where there are label sets."""
    sets = [folder for folder in (corpus / "codes", corpus / "embeddings") if folder.exists()]
    base = {
        "cuts": [corpus / "fbank" / f"cuts_{part}.jsonl.gz"], "shar_dir": corpus / name, "num_shards": num_shards,
        "label_dir": sets, "store": "both", "feature_codec": "numpy", "min_coverage": 0.5,
    }  # fmt: skip
    export_shar(SharConfig(**{**base, **options}))
    return corpus / name


def spec(path: Path, name="kd", kind="codebook_indexes", **options) -> LabelSpec:
    """Return what a system that wants the codes says."""
    return LabelSpec(name=name, kind=kind, path=str(path), **options)


def content(folder: Path) -> dict[str, bytes]:
    """Return all files of a Shar but its locks."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.endswith("lock"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
