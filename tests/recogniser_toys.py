"""Untrained joint CTC/attention recognisers in exp_dirs, that say something."""

from dataclasses import replace
from pathlib import Path

import torch

from icefall_kd.cli import config_to_dict
from icefall_kd.config import AttentionDecoderConfig, ExtractConfig, ModelConfig, TeacherConfig, TrainConfig
from icefall_kd.decode.base import Hypothesis
from icefall_kd.models.ctc_attention import CtcAttentionModel
from icefall_kd.systems import build_system
from icefall_kd.teachers.recogniser import RecogniserTeacher
from icefall_kd.text.tokenizer import Tokenizer
from icefall_kd.train.checkpoint import save_checkpoint

SIZES = {
    "encoder_size": "tiny",
    "num_encoder_layers": 2,
    "encoder_dim": 32,
    "num_heads": 2,
    "feedforward_dim": 48,
    "cnn_kernel": 5,
    "subsampling_channels": (4, 6, 8),
}
KINDS = ("ctc_posteriors", "token_posteriors", "nbest", "embeddings")
CPU = TeacherConfig(teacher_device="cpu")


def recogniser_config(decoder: str = "ar", **model) -> TrainConfig:
    attention = AttentionDecoderConfig(
        attention_decoder=decoder, num_decoder_layers=1, decoder_feedforward_dim=48, ctc_weight=0.4
    )
    return TrainConfig(system="nar", model=ModelConfig(**SIZES | model), attention=attention)


def write_recogniser(exp_dir: Path, tokenizer: Tokenizer, config: TrainConfig | None = None, seed: int = 5) -> Path:
    """Write an exp_dir whose two averages differ from its newest parameters, and whose posteriors are not flat."""
    config = config or recogniser_config()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        system = build_system(config, tokenizer.vocab_size, inference=True)
        with torch.no_grad():
            system.model.ctc_output.weight.normal_()
            system.model.decoder.output.weight.normal_()
    tokenizer.save(exp_dir / "tokenizer")
    state = system.state_dict()
    average = {k: v.double() * (1.25 if v.is_floating_point() else 1) for k, v in state.items()}
    about = {"config": config_to_dict(config), "tokenizer_hash": tokenizer.hash}
    content = {"model": state, "model_avg": average, "train": {"step": 10, "average_period": 10}}
    save_checkpoint(exp_dir / "epoch-1.pt", content | about)
    return exp_dir


class ToySearch:
    """Greedy CTC, and what is left of it without its last or its first token; hypotheses may be the same."""

    def __init__(self, model: CtcAttentionModel) -> None:
        self.model = model

    def decode(self, encoder_out, encoder_out_lens):
        best = self.model.ctc_log_probs(encoder_out).max(dim=2)
        found = []
        for scores, ids, n in zip(best.values, best.indices, encoder_out_lens.tolist(), strict=True):
            tokens, score = torch.unique_consecutive(ids[:n]).tolist(), float(scores[:n].sum())
            tokens = [t for t in tokens if t != 0]
            some = [Hypothesis(tokens, score), Hypothesis(tokens[:-1], score - 1), Hypothesis(tokens[1:], score - 2)]
            found.append(some)
        return found


def load_teacher(exp_dir: Path, cfg: TeacherConfig = CPU, **options) -> RecogniserTeacher:
    """Load a recogniser whose n-best lists are those of the toy search."""
    teacher = RecogniserTeacher.load(exp_dir, cfg, **options)
    teacher._search = ToySearch(teacher.model)
    return teacher


def training_config(exp_dir: Path, lang_dir: Path, student: TrainConfig, **kd) -> TrainConfig:
    """Return the options of a student that distils online from the recogniser in ``exp_dir``."""
    return replace(
        student,
        data=replace(student.data, lang_dir=lang_dir),
        kd=replace(student.kd, teacher_labels="online"),
        recogniser_kd=replace(student.recogniser_kd, **kd),
        teacher=replace(CPU, teacher=str(exp_dir)),
    )


def kind_configs(cuts: Path, folder: Path, kinds=KINDS, **options) -> list[ExtractConfig]:
    """Return the configurations of a label set a kind, in folders of that name."""
    base = {"cuts": [cuts], "part_utterances": 3, "teacher": CPU, "embeddings_dtype": "float32", "top_k": 4}
    return [ExtractConfig(**base | {"label_dir": folder / kind, "kind": kind} | options) for kind in kinds]
