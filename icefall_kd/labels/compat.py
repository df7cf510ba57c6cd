"""Refuse label sets that do not fit the training that wants them."""

from icefall_kd.errors import ConfigError, DataError
from icefall_kd.labels.info import RECOGNISER_ROWS, LabelSetInfo


def check_label_compat(
    info: LabelSetInfo,
    where: str,
    *,
    time_warp_factor: int = 0,
    kind: str | None = None,
    teacher: dict | None = None,
    quantizer_sha256: str | None = None,
    refine_iters: int | None = None,
    corpus_fingerprint: str | None = None,
    tokenizer_hash: str | None = None,
) -> None:
    """Raise unless a label set is what a training asks for; whatever is None is not asked.

    That every cut has labels at its own speed and span is checked by ``LabelStore.join``.

    Args:
        info: provenance of the set.
        where: path of the set, for messages.
        time_warp_factor: SpecAugment's time warp in frames; 1 and more moves frames away from labels of audio.
        kind: LabelSetInfo.kind.
        teacher: ``Teacher.provenance()`` of the wanted teacher.
        quantizer_sha256, refine_iters: the wanted quantizer and its search.
        corpus_fingerprint: of the cuts that the labels must have been made for.
        tokenizer_hash: of the training's tokenizer, which a recogniser's labels must name.
    Raises:
        ConfigError: time warp with labels.
        DataError: another provenance; the message names the field and both values.
    """
    if time_warp_factor >= 1 and info.key_kind == "audio":
        raise ConfigError(
            f"--spec-aug-time-warp-factor is {time_warp_factor}, labels of {where} need 0: time warp moves the "
            "student's frames away from the teacher's"
        )
    made_with = info.extra.get("tokenizer_hash")
    if info.kind in RECOGNISER_ROWS and tokenizer_hash is not None and made_with != tokenizer_hash:
        raise DataError(
            f"label set {where} holds token ids of tokenizer {made_with}, this training's is {tokenizer_hash}; train "
            "with the teacher's --lang-dir, or extract labels of a teacher of these tokens"
        )
    expect = {
        "kind": kind,
        "quantizer_sha256": quantizer_sha256,
        "refine_iters": refine_iters,
        "corpus_fingerprint": corpus_fingerprint,
    }
    info.check({**teacher_expectations(teacher or {}), **expect}, where)


def teacher_expectations(provenance: dict) -> dict:
    """Return ``LabelStore(expect=...)`` for a teacher's provenance: what decides the labels, not where it ran."""
    names = {"weights_sha256": "teacher_sha256"}
    wanted = ("weights_sha256", "layer", "layer_convention", "normalization", "frame_formula", "dim")
    return {names.get(name, name): provenance[name] for name in wanted if name in provenance}
