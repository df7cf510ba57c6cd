"""What trainings are called in tables of results, by their options."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from icefall_kd.labels.info import TEXT_KIND

if TYPE_CHECKING:
    from icefall_kd.results import LabelStorage

SYSTEM_NAMES = {
    ("mvq", "none"): "student without KD",
    ("mvq", "l1"): "student with L1 embedding KD",
    ("mvq", "l2"): "student with L2 embedding KD",
    ("mvq", "mvq"): "student with MVQ-KD",
}
# Terms of --system nar that make its two levels of distillation.
NAR_LEVELS = {
    "frame": ("ctc_kd_scale", "token_kd_scale", "encoder_kd_scale"),
    "sequence": ("nbest_ctc_scale", "nbest_token_scale"),
}
# The experiments of --system dualmode by the modes of pre-training (its folder's name), modes, and whether streams are
# sparse.
DUAL_EXPERIMENTS = {
    ("", "full", False): "A1",
    ("", "streaming", False): "A2",
    ("", "streaming", True): "A3",
    ("", "dual", False): "A4",
    ("", "dual", True): "A5",
    ("full", "full", False): "B1",
    ("full", "streaming", True): "B2",
    ("full", "dual", True): "B3",
    ("streaming", "streaming", True): "B4",
    ("dual", "full", False): "C1",
    ("dual", "dual", True): "C2",
}


STRUCTURES = {"base": "HuBERT", "deep_thin": "deep thin", "shallow_wide": "shallow wide", "fithubert": "FitHuBERT"}


def distils(config: dict) -> bool:
    """Return whether a training has a distillation loss."""
    return config.get("kd", "none") != "none" or bool(nar_levels(config)) or bool(hkd_losses(config))


def nar_levels(config: dict) -> list[str]:
    """Return the levels of distillation of a training of --system nar."""
    return [level for level, terms in NAR_LEVELS.items() if any(config.get(term, 0) > 0 for term in terms)]


def hkd_losses(config: dict) -> list[str]:
    """Return the distillation losses of a training of --system hkd: acd, lrd."""
    return [name for name in config.get("text_kd") or () if config.get(f"{name}_scale", 0) > 0]


def system_name(config: dict, labels: "Sequence[LabelStorage]" = (), start: dict | None = None) -> str:
    """Return what a training is called in tables.

    Args:
        config: its options.
        labels: its label sets; of a language model's states they tell which it was, and whether it has learnt anything.
        start: the options of the training that it started from, where they are known.
    """
    if config.get("system") == "hubert":
        words = hubert_model(config), hubert_origin(config, start or {}), transcripts(config)
        return ", ".join(filter(None, words))
    if config.get("system") == "hkd":
        name = " + ".join(["CIF", *(loss.upper() for loss in hkd_losses(config))])
        of = [f"{s.teacher}, RANDOM weights" if s.random else s.teacher for s in labels if s.kind == TEXT_KIND]
        return f"{name} ({of[0]})" if of else name
    if config.get("system") == "dualmode":
        return _dual_name(config)
    if config.get("system") == "nar":
        if config.get("attention_decoder") == "ar":
            return "AR"
        parts = ["NAR", *(["transfer"] if config.get("init_from") else [])]
        levels = nar_levels(config)
        return " + ".join([*parts, *([" and ".join(levels) + " KD"] if levels else [])])
    key = (config.get("system", "?"), config.get("kd", "none"))
    return ("streaming " if config.get("streaming") else "") + SYSTEM_NAMES.get(key, " ".join(key))


def _dual_name(config: dict) -> str:
    """Return modes and pre-training of a training of --system dualmode, behind the experiment's short name."""
    modes, sparse = config.get("modes", "dual"), config.get("sparsity", 0) > 0
    start = config.get("init_from")
    arm = Path(start).name.removeprefix("ssl-") if start else ""
    words = [DUAL_EXPERIMENTS.get((arm, modes, sparse), ""), "sparse" if sparse and modes == "streaming" else ""]
    name = " ".join([*filter(None, words), {"dual": "both modes"}.get(modes, f"{modes} mode")])
    name += ", streams sparse" if sparse and modes == "dual" else ""
    return name + (f", {arm} pre-training" if arm else "")


def hubert_model(config: dict) -> str:
    """Return structure and front end of a training of --system hubert."""
    name = STRUCTURES.get(config.get("structure", "base"), "?")
    return name + (" log-mel" if config.get("front_end") == "fbank" else "")


def hubert_origin(config: dict, start: dict) -> str:
    """Return what a training of --system hubert learns, or what the one learnt that it starts from.

    Args:
        config: its options.
        start: those of the training of --init-from; empty: not known.
    """
    if config.get("objective") != "asr":
        start = config
    elif not config.get("init_from"):
        return "from scratch"
    if start.get("objective") == "ssl":
        return "pre-trained"
    if start.get("objective") != "distil":
        return f"from {Path(config['init_from']).name}"
    losses = ["L_reg"] if start["rec_scale"] > 0 or start["cos_scale"] > 0 else []
    if start["disc_scale"] > 0:
        losses.append(f"L_disc ({start['disc_type']})")
    stages = ""
    if start.get("front_end") == "fbank":
        stages = "two stages, " if start["frontend_steps"] > 0 else "one stage, "
    return stages + " + ".join(losses)


def transcripts(config: dict) -> str:
    """Return how much a recogniser was fine-tuned with, by the name of its one part; empty: all there is, or none."""
    parts = config.get("train_parts", ()) if config.get("objective") == "asr" else ()
    found = re.search(r"_(\d+(?:\.\d+)?(?:s|min|h))(?:\.jsonl(?:\.gz)?)?$", parts[0]) if len(parts) == 1 else None
    return found[1] if found else ""
