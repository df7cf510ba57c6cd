"""Extraction of a recogniser's labels: one pass for all kinds, the same bytes each time, along the transcripts."""

import numpy as np
import pytest
import torch
from label_toys import ToyTeacher, write_cuts
from lhotse import CutSet
from lhotse.utils import fastcopy
from recogniser_toys import CPU, KINDS, kind_configs, load_teacher, write_recogniser
from test_extract import script_main, shard_bytes

from icefall_kd.cli import parse_config
from icefall_kd.config import ExtractLayersConfig, TeacherConfig
from icefall_kd.data.batch import Batch
from icefall_kd.errors import ConfigError, DataError
from icefall_kd.labels.extract import extract_layers
from icefall_kd.labels.keys import label_key
from icefall_kd.labels.recogniser import unpack_nbest
from icefall_kd.labels.store import LabelStore
from icefall_kd.results import measure_labels
from icefall_kd.teachers.recogniser import RecogniserOptions
from icefall_kd.text.tokenizer import Tokenizer

OPTIONS = RecogniserOptions(top_k=4, nbest_size=2, beam_size=5)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train_char(["text 0123456789"])


@pytest.fixture(scope="module")
def exp_dir(tmp_path_factory, tokenizer):
    return write_recogniser(tmp_path_factory.mktemp("recogniser"), tokenizer)


@pytest.fixture(scope="module")
def teacher(exp_dir):
    """Return a recogniser that notes what it hears; ``fail_after`` ends it after so many batches."""
    teacher = load_teacher(exp_dir, options=OPTIONS)
    extract, teacher.heard, teacher.fail_after = teacher.extract, [], None

    def noting(batch):
        if teacher.fail_after == 0:
            raise KeyboardInterrupt
        teacher.fail_after = None if teacher.fail_after is None else teacher.fail_after - 1
        teacher.heard += batch.ids
        return extract(batch)

    teacher.extract = noting
    return teacher


@pytest.fixture
def cuts(tmp_path, teacher):
    teacher.heard.clear()
    return write_cuts(tmp_path / "audio", [0.31, 0.44, 0.5, 0.63, 0.77, 0.9, 1.2])


def test_all_kinds_come_from_one_pass_and_are_those_of_a_run_each(tmp_path, cuts, teacher):
    reports = extract_layers(kind_configs(cuts, tmp_path / "one"), teacher)
    assert [(r.utterances, r.rejected) for r in reports] == [(7, 0)] * 4
    assert len(teacher.heard) == 7
    for kind in KINDS:
        extract_layers(kind_configs(cuts, tmp_path / "each", [kind]), teacher)
        assert shard_bytes(tmp_path / "one" / kind) == shard_bytes(tmp_path / "each" / kind)
        store = LabelStore(tmp_path / "one" / kind)
        assert store.verify() == [] and len(store) == 7
        cost = measure_labels(store.path)
        assert cost.bytes_per_hour == pytest.approx(
            sum(f.stat().st_size for f in store.path.glob("*.safetensors")) / cost.hours
        )


def test_the_rows_are_what_the_teacher_says_of_each_utterance(tmp_path, cuts, teacher, tokenizer):
    extract_layers(kind_configs(cuts, tmp_path, extract_max_duration=3.0), teacher)
    stores = {kind: LabelStore(tmp_path / kind) for kind in KINDS}
    for cut in CutSet.from_file(cuts):
        wave, ids = torch.from_numpy(cut.load_audio()[0]), tokenizer.encode(cut.supervisions[0].text)
        batch = Batch.from_audio([wave])
        batch = Batch(**{**vars(batch), "y": torch.tensor([ids]), "y_lens": torch.tensor([len(ids)])})
        out, rows = teacher.extract(batch), {kind: store.get(label_key(cut)) for kind, store in stores.items()}
        assert rows["token_posteriors"][:, 0].tolist() == ids
        for kind in ("ctc_posteriors", "token_posteriors"):
            alone = out.arrays[kind][0].numpy()
            k = 4
            bits = [r[:, -k - 1 :].astype(np.uint16).view(np.float16).astype(float) for r in (rows[kind], alone)]
            assert np.abs(bits[0] - bits[1]).max() < 2e-3
            assert np.array_equal(rows[kind][:, -2 * k - 1], alone[:, -2 * k - 1])  # the likeliest class
        found, wanted = unpack_nbest(rows["nbest"]), unpack_nbest(out.arrays["nbest"][0].numpy())
        assert [t for t, _ in found] == [t for t, _ in wanted] and len(found) <= 2
        assert [s for _, s in found] == pytest.approx([s for _, s in wanted], abs=1e-3)
        assert np.allclose(rows["embeddings"], out.arrays["embeddings"][0], atol=1e-5)


def test_a_run_that_was_ended_goes_on_to_the_same_bytes(tmp_path, cuts, teacher):
    options = {"extract_max_duration": 1.2, "num_shards": 2, "part_utterances": 1}
    for k in (0, 1):
        extract_layers(kind_configs(cuts, tmp_path / "whole", shard=k, **options), teacher)
    for k in (0, 1):
        configs = kind_configs(cuts, tmp_path / "set", shard=k, **options)
        teacher.fail_after = 2
        with pytest.raises(KeyboardInterrupt):
            extract_layers(configs, teacher)
        teacher.fail_after = None
        teacher.heard.clear()
        reports = extract_layers(configs, teacher)
        assert len(teacher.heard) == reports[0].utterances - 2  # what was done is not done again
    for kind in KINDS:
        assert shard_bytes(tmp_path / "set" / kind) == shard_bytes(tmp_path / "whole" / kind)
        assert len(shard_bytes(tmp_path / "set" / kind)) == 2


def test_a_set_says_what_made_it(tmp_path, cuts, teacher, tokenizer, exp_dir):
    extract_layers(kind_configs(cuts, tmp_path), teacher)
    infos = {kind: LabelStore(tmp_path / kind).info for kind in KINDS}
    shared = {"tokenizer_hash": tokenizer.hash, "vocab_size": tokenizer.vocab_size}
    for kind, own in (
        ("ctc_posteriors", {"top_k": 4}),
        ("token_posteriors", {"top_k": 4}),
        ("nbest", {"nbest_size": 2, "beam_size": 5, "search_ctc_weight": 0.4}),
    ):
        extra = infos[kind].extra
        assert {name: extra[name] for name in shared | own} == shared | own
        assert infos[kind].layer is None and infos[kind].dim == 32
        assert infos[kind].teacher_sha256 == teacher.provenance()["weights_sha256"]
    assert "tokenizer_hash" not in infos["embeddings"].extra and infos["embeddings"].layer == 2
    other = load_teacher(exp_dir, options=RecogniserOptions(top_k=3, nbest_size=2, beam_size=7))
    with pytest.raises(DataError, match=r"width is 9 and 7.*'top_k': 4.*'top_k': 3"):
        extract_layers(kind_configs(cuts, tmp_path, ["ctc_posteriors"]), other)
    with pytest.raises(DataError, match=r"'beam_size': 5.*'beam_size': 7"):
        extract_layers(kind_configs(cuts, tmp_path, ["nbest"]), other)


def test_a_cut_without_text_has_no_tokens_to_follow(tmp_path, cuts, teacher):
    some = list(CutSet.from_file(cuts))
    some[2] = fastcopy(some[2], supervisions=[])
    some[4] = fastcopy(some[4], supervisions=[fastcopy(some[4].supervisions[0], text="zz te")])  # z is no token
    CutSet.from_cuts(some).to_file(tmp_path / "some.jsonl.gz")
    extract_layers(kind_configs(tmp_path / "some.jsonl.gz", tmp_path), teacher)
    store = LabelStore(tmp_path / "token_posteriors")
    assert store.verify() == []
    assert store.get(label_key(some[2])).shape == (0, 10)
    ids = teacher.tokenizer.encode("zz te")
    assert ids[:2] == [2, 2] and store.get(label_key(some[4]))[:, 0].tolist() == ids


def test_an_utterance_whose_encoding_is_not_finite_is_rejected_for_all_kinds(tmp_path, cuts, teacher, monkeypatch):
    extract = teacher.encoder.extract

    def spoilt(batch):
        out = extract(batch)
        if "rec3-0" in batch.ids:
            out.arrays["embeddings"][batch.ids.index("rec3-0"), 0, 0] = float("nan")
        return out

    monkeypatch.setattr(teacher.encoder, "extract", spoilt)
    reports = extract_layers(kind_configs(cuts, tmp_path, max_reject_ratio=0.2), teacher)
    assert [(r.utterances, r.rejected) for r in reports] == [(6, 1)] * 4


def test_a_teacher_that_is_no_recogniser_is_refused(tmp_path, cuts):
    with pytest.raises(ConfigError, match="a ToyTeacher gives no nbest; --teacher must be an exp_dir"):
        extract_layers(kind_configs(cuts, tmp_path, ["nbest"]), ToyTeacher())
    config = kind_configs(cuts, tmp_path, ["nbest"], teacher=TeacherConfig(teacher="whisper-tiny.en"))
    with pytest.raises(ConfigError, match=r"--teacher whisper-tiny\.en is no exp_dir with checkpoints"):
        extract_layers(config)
    assert not (tmp_path / "nbest").exists()


def test_the_command_line_names_a_folder_for_each_kind():
    options = ["--cuts", "c", "--teacher", "t", "--label-dir", "a,b,c"]
    config = parse_config(ExtractLayersConfig, [*options, "--kind", "ctc_posteriors,token_posteriors,nbest"])
    assert [(c.kind, str(c.label_dir), c.quantizer) for c in config.each()] == [
        ("ctc_posteriors", "a", None), ("token_posteriors", "b", None), ("nbest", "c", None),
    ]  # fmt: skip
    for wrong, message in (
        (["--kind", "ctc_posteriors,nbest"], "2 layers, --label-dir 3 folders"),
        (["--kind", "nbest,codebook_indexes,embeddings", "--quantizer", "q"], "codebook_indexes and other layers in"),
        (["--kind", "nbest,embeddings,ctc_posteriors", "--layer", "1,2,3"], "other layers in a run of their own"),
        (["--kind", "nbest"], "1 layers, --label-dir 3 folders"),
        (["--kind", "nbest,embeddings,posteriors"], "posteriors"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_config(ExtractLayersConfig, [*options, *wrong])


def test_the_commands_print_what_an_hour_costs(tmp_path, repo, cuts, exp_dir, monkeypatch, capsys):
    folders = [tmp_path / "ctc", tmp_path / "tokens", tmp_path / "nbest"]
    script_main(
        repo, "extract_labels", monkeypatch, "--cuts", cuts, "--label-dir", ",".join(map(str, folders)),
        "--kind", "ctc_posteriors,token_posteriors,nbest", "--teacher", exp_dir, "--top-k", 3,
        "--nbest-size", 2, "--nbest-beam-size", 3, "--teacher-device", CPU.teacher_device,
    )  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    for line, folder in zip(lines, folders, strict=True):
        cost = LabelStore(folder).storage_report()
        size = next(folder.glob("*.safetensors")).stat().st_size
        assert f"{size / cost['hours']:,.0f} bytes an hour" in line and "7 utterances" in line
    script_main(repo, "label_sets", monkeypatch, "info", folders[1])
    info = capsys.readouterr().out
    # 14 characters and 4 specials of 4 bytes, against a token, 3 classes, 3 probabilities and a rest of 2 bytes each
    assert "float32 posteriors of 18 would take 4.5 times as much" in info and " tokens, " in info
    script_main(repo, "label_sets", monkeypatch, "info", folders[2])
    info = capsys.readouterr().out
    assert "float32" not in info.rpartition("}")[2] and " numbers, " in info
    script_main(repo, "label_sets", monkeypatch, "verify", *folders)
    assert capsys.readouterr().out.count("all sound, ") == 3
    store = LabelStore(folders[2])
    lists = [unpack_nbest(store.get(key)) for key in store.keys()]
    assert all(len(hypotheses) == 2 for hypotheses in lists)
