"""What a Mask-CTC student takes from its autoregressive teacher before its first step."""

import dataclasses

import pytest
import torch
from nar_toys import nar_config, toy_batch, write_exp_dir

from icefall_kd.config import TransferConfig
from icefall_kd.decode.ctc import CtcGreedySearch
from icefall_kd.errors import ConfigError
from icefall_kd.systems import build_system
from icefall_kd.text.tokenizer import Tokenizer
from icefall_kd.train.transfer import initialise

TOKENS = Tokenizer.train_char(["ONE TWO THREE"])
STUDENT = TransferConfig(init_modules=["encoder", "ctc"])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    exp_dir = tmp_path_factory.mktemp("teacher")
    return exp_dir, write_exp_dir(exp_dir, nar_config("ar", model={"num_encoder_layers": 4}), TOKENS)


def student(seed=8, **options):
    torch.manual_seed(seed)
    return build_system(nar_config("mlm", **{"model": {"num_encoder_layers": 4}, **options}), TOKENS.vocab_size).eval()


def greedy(system, batch):
    with torch.no_grad():
        hyps = CtcGreedySearch(system.model).decode(*system.encode(batch))
    return [(h[0].tokens, h[0].timestamps, h[0].score) for h in hyps]


def test_before_the_first_update_the_ctc_output_is_the_teachers(teacher):
    exp_dir, system = teacher
    batch, new = toy_batch(x_lens=(400, 290, 150), y_lens=(3, 3, 3)), student()
    wanted = greedy(system, batch)
    assert sum(len(tokens) for tokens, *_ in wanted) > 30 and greedy(new, batch) != wanted
    record, report = initialise(new, exp_dir, STUDENT, TOKENS.hash)
    assert greedy(new, batch) == wanted
    names = list(new.state_dict())
    assert report.loaded == [n for n in names if not n.startswith("model.decoder.")] and not report.mismatched
    assert report.missing == [n for n in names if n.startswith("model.decoder.")] == report.skipped
    assert not report.unexpected
    assert record["loaded"] == len(report.loaded) and record["skipped"] == len(report.skipped)


def test_the_decoder_goes_along_when_it_is_named_and_its_mask_is_the_mean(teacher):
    exp_dir, system = teacher
    new = student()
    _, report = initialise(new, exp_dir, TransferConfig(init_modules=["encoder", "ctc", "decoder"]), TOKENS.hash)
    assert not report.missing and not report.skipped
    embedding, theirs = new.model.decoder.embedding.weight, system.model.decoder.embedding.weight
    assert torch.equal(embedding[:-1], theirs[:-1])
    torch.testing.assert_close(embedding[-1], theirs[:-1].mean(dim=0))
    for name, tensor in system.model.decoder.state_dict().items():
        if name != "embedding.weight":
            assert torch.equal(new.model.decoder.state_dict()[name], tensor), name


def test_a_mask_that_was_trained_is_kept(tmp_path):
    system = write_exp_dir(tmp_path, nar_config("mlm", model={"num_encoder_layers": 4}), TOKENS)
    new = student()
    initialise(new, tmp_path, TransferConfig(), TOKENS.hash)
    assert torch.equal(new.model.decoder.embedding.weight, system.model.decoder.embedding.weight)


def test_a_teacher_of_fewer_tokens_is_refused_by_its_tokens(teacher):
    exp_dir, _ = teacher
    other = Tokenizer.train_char(["ONE TWO THREE FOUR"])
    torch.manual_seed(8)
    new = build_system(nar_config("mlm", model={"num_encoder_layers": 4}), other.vocab_size)
    with pytest.raises(ConfigError, match="was trained with tokenizer"):
        initialise(new, exp_dir, TransferConfig(init_modules=["encoder", "ctc", "decoder"]), other.hash)


def test_a_shallower_student_takes_the_layers_that_are_named(teacher):
    exp_dir, system = teacher
    new = student(model={"num_encoder_layers": 2}, attention={"num_decoder_layers": 1})
    transfer = TransferConfig(
        init_modules=["encoder", "ctc", "decoder"], init_encoder_layers=[2, 4], init_decoder_layers=[2]
    )
    _, report = initialise(new, exp_dir, transfer, TOKENS.hash)
    for mine, part, theirs in ((0, "encoder", 1), (1, "encoder", 3), (0, "decoder", 1)):
        a, b = (getattr(s.model, part).layers[i].state_dict() for s, i in ((new, mine), (system, theirs)))
        assert all(torch.equal(a[n], b[n]) for n in b)
    assert not report.missing and not report.mismatched
    layer = system.model.encoder.layers[0].state_dict()
    assert len([n for n in report.skipped if n.startswith("model.encoder.layers.")]) == 2 * len(layer)
    assert any(" <- model.encoder.layers.3." in n for n in report.loaded)


def test_another_width_is_named_tensor_by_tensor(teacher):
    exp_dir, _ = teacher
    new = student(attention={"decoder_feedforward_dim": 24})
    _, report = initialise(new, exp_dir, TransferConfig(), TOKENS.hash)
    expand = [n for n in report.mismatched if n.startswith("model.decoder.layers.0.expand.weight")]
    assert expand == ["model.decoder.layers.0.expand.weight (48, 32) in the file, (24, 32) in the model"]
    narrow = {"encoder_dim": 16, "subsampling_channels": (2, 2, 2), "num_encoder_layers": 1}
    other = build_system(nar_config("mlm", model=narrow), TOKENS.vocab_size + 1)  # its CTC head has nothing in common
    with pytest.raises(ConfigError, match="no tensor has a name and shape"):
        initialise(other, exp_dir, TransferConfig(init_modules=["ctc"]))


def test_a_layer_that_does_not_exist_is_refused(teacher):
    exp_dir, _ = teacher
    transfer = dataclasses.replace(STUDENT, init_encoder_layers=[2, 5])
    with pytest.raises(ConfigError, match=r"--init-encoder-layers names layer 5; the encoder of .* has 4 layers"):
        initialise(student(), exp_dir, transfer, TOKENS.hash)
    for wrong, message in (
        ({"init_modules": ["joiner"]}, "names 'joiner'"),
        ({"init_encoder_layers": [0]}, "layers count from 1"),
        ({"init_encoder_layers": [2, 4, 2]}, "--init-encoder-layers names layer 2 twice"),
        ({"init_decoder_layers": [1, 1]}, "--init-decoder-layers names layer 1 twice"),
        ({"init_modules": ["ctc"], "init_encoder_layers": [1]}, "leaves out encoder"),
    ):
        with pytest.raises(ConfigError, match=message):
            TransferConfig(**wrong)


def test_other_tokens_are_refused_unless_the_encoder_alone_is_taken(teacher):
    exp_dir, system = teacher
    other = Tokenizer.train_char(["ONE TWO TFREE"])  # as many, so that no shape tells
    assert other.vocab_size == TOKENS.vocab_size
    with pytest.raises(ConfigError, match=r"was trained with tokenizer .* take --init-modules encoder alone"):
        initialise(student(), exp_dir, STUDENT, other.hash)
    new = student()
    initialise(new, exp_dir, TransferConfig(init_modules=["encoder"]), other.hash)
    assert torch.equal(next(new.model.encoder.parameters()), next(system.model.encoder.parameters()))
