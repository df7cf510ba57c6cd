"""A recogniser's labels: what is packed comes out, what packing loses is bounded, what cannot be is refused."""

import json
import math

import numpy as np
import pytest
import torch
from label_toys import toy_info

from icefall_kd.errors import DataError
from icefall_kd.frames import FBANK_CONV2D
from icefall_kd.labels.recogniser import (
    check_reference,
    collate_nbest,
    collate_posteriors,
    pack_nbest,
    pack_posteriors,
    packing_error,
    posterior_width,
    unpack_nbest,
    unpack_posteriors,
)
from icefall_kd.labels.store import LabelStore
from icefall_kd.losses.posterior_kd import posterior_kd

V = 40


def recogniser_info(kind, top_k=4, vocab_size=V, **changes):
    width = 1 if kind == "nbest" else posterior_width(top_k, kind == "token_posteriors")
    base = {"kind": kind, "dtype": "int32" if kind == "nbest" else "uint16", "width": width, "layer": None}
    extra = {"vocab_size": vocab_size, "tokenizer_hash": "t", "top_k": top_k}
    codes = dict.fromkeys(("num_codebooks", "codebook_size", "quantizer_sha256"))
    return toy_info(**{**base, **codes, "extra": extra, "frame_formula": FBANK_CONV2D.to_dict(), **changes})


def posteriors(rows, sharpness=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn(rows, V, generator=generator)).softmax(dim=1)


def as_stored(rows):
    return rows.numpy().astype(np.uint16)


@pytest.mark.parametrize("with_reference", [False, True])
def test_posteriors_come_back(with_reference):
    probs = posteriors(12)
    reference = torch.arange(12) + 3 if with_reference else None
    rows = pack_posteriors(probs, 5, reference)
    assert rows.shape == (12, posterior_width(5, with_reference)) and int(rows.min()) >= 0
    stored = as_stored(rows)
    if with_reference:
        assert stored[:, 0].tolist() == list(range(3, 15))
    labels = collate_posteriors([stored[:7], None, stored[7:]], stored.shape[1], with_reference)
    assert labels.lens.tolist() == [7, 0, 5]
    for i, expected in ((0, probs[:7]), (2, probs[7:])):
        n = len(expected)
        ordered, ids = expected.sort(dim=1, descending=True)
        assert torch.equal(labels.ids[i, :n], ids[:, :5])
        assert torch.allclose(labels.probs[i, :n], ordered[:, :5], rtol=1.5e-3, atol=1e-7)
        assert torch.allclose(labels.rest[i, :n], ordered[:, 5:].sum(dim=1), rtol=1.5e-3, atol=1e-7)
        assert torch.allclose(labels.probs[i, :n].sum(dim=1) + labels.rest[i, :n], torch.ones(n), atol=1e-6)
        assert (labels.probs[i, n:] == 0).all()


def test_a_rest_that_is_small_keeps_its_size():
    probs = torch.full((1, V), 1e-5)
    probs[0, 7] = 1 - 39e-5
    labels = unpack_posteriors(pack_posteriors(probs, 2)[None], torch.tensor([1]), False)
    assert labels.ids[0, 0, 0] == 7
    assert float(labels.rest[0, 0]) == pytest.approx(38e-5, rel=2e-3)


@pytest.mark.parametrize("sharpness", [0.0, 0.5, 2.0, 6.0, 20.0])
@pytest.mark.parametrize("top_k", [1, 4, 16, V])
def test_the_loss_from_packed_posteriors_is_the_exact_one_within_the_bound(sharpness, top_k):
    teacher = posteriors(300, sharpness, seed=1)
    logits = 3 * torch.randn(300, V, generator=torch.Generator().manual_seed(2))
    log_q = logits.double().log_softmax(dim=1)
    lowest = float(log_q.min())
    packed = unpack_posteriors(pack_posteriors(teacher, top_k)[None], torch.tensor([300]), False)
    loss = posterior_kd(logits, packed.ids[0], packed.probs[0], packed.rest[0])
    # Exactly, in double precision: over k + 1 classes, and over all of them.
    p = teacher.double() / teacher.double().sum(dim=1, keepdim=True)
    top, ids = p.topk(top_k, dim=1)
    rest = p.scatter(1, ids, 0.0).sum(dim=1)
    log_q_rest = log_q.scatter(1, ids, -math.inf).logsumexp(dim=1)
    by_sum = torch.special.xlogy(top, top).sum(1) - (top * log_q.gather(1, ids)).sum(1)
    by_sum += torch.special.xlogy(rest, rest) - torch.where(rest > 0, rest * log_q_rest, 0.0)
    whole = torch.special.xlogy(p, p).sum(1) - (p * log_q).sum(1)
    slack = 2e-5  # of float32 in the loss itself
    rounding = packing_error(loss, torch.zeros(300), top_k, lowest)
    assert ((loss - by_sum).abs() <= rounding + slack).all()
    assert (whole - loss >= -rounding - slack).all()
    assert (whole - loss <= packing_error(loss, rest.float(), top_k, lowest) + slack).all()
    assert float(rounding.max()) < 0.1  # a bound that says something: losses here are of several nats


def test_nbest_comes_back_best_first_and_once():
    hypotheses = [([5, 6], -4.0), ([5], -1.5), ([5, 0, 6], -3.0), ([], -7.25), ([9], -9.0)]
    rows = pack_nbest(hypotheses, 3, silent=(0, 1))
    assert rows.dtype == np.int32 and rows.shape == (1 + 3 * 2 + 3, 1)
    found = unpack_nbest(rows)
    assert [tokens for tokens, _ in found] == [[5], [5, 6], []]
    merged = math.log(math.exp(-4.0) + math.exp(-3.0))
    assert [score for _, score in found] == pytest.approx([-1.5, merged, -7.25], rel=1e-6)
    labels = collate_nbest([found, None, [([3, 3, 4], -0.5)]])
    assert labels.tokens.tolist()[0] == [[5, 0, 0], [5, 6, 0], [0, 0, 0]]
    assert labels.lens.tolist() == [[1, 2, 0], [0, 0, 0], [3, 0, 0]]
    assert labels.scores[1].tolist() == [-math.inf] * 3 and labels.scores[2].tolist() == [-0.5, -math.inf, -math.inf]
    assert unpack_nbest(pack_nbest([], 3, ())) == []
    none = collate_nbest([None, []])
    assert none.tokens.shape == (2, 1, 1) and (none.scores == -math.inf).all()
    with pytest.raises(DataError, match="score nan"):
        pack_nbest([([5], math.nan)], 3, ())


@pytest.mark.parametrize("numbers", [[], [1], [2, 0, 0], [1, 0, 3, 5], [1, 0, -1], [-1], [0, 7], [1, 0, 1, 5, 5]])
def test_a_damaged_list_is_refused(numbers):
    with pytest.raises(DataError, match="does not end where they do"):
        unpack_nbest(np.array(numbers, np.int32)[:, None])


def test_token_posteriors_of_another_transcript_are_refused():
    rows = as_stored(pack_posteriors(posteriors(2), 3, torch.tensor([3, 4])))
    table = ["<blk>", "<sos/eos>", "<unk>", "a", "b", "<mask>"]
    check_reference(rows, [3, 4], table, "utt7", "rec7|0|9|1/1")
    with pytest.raises(DataError, match=r"utt7 \(key rec7\|0\|9\|1/1\).*along 'a b', its transcript is 'a a'"):
        check_reference(rows, [3, 3], table, "utt7", "rec7|0|9|1/1")
    with pytest.raises(DataError, match="its transcript is 'a'"):
        check_reference(rows, [3], table, "utt7", "rec7|0|9|1/1")


def rows_of(kind, samples):
    if kind == "nbest":
        return pack_nbest([([5, 6, 7], -1.0), ([5, 7], -2.0)], 4, ())
    count = FBANK_CONV2D.num_frames(samples) if kind == "ctc_posteriors" else 3
    reference = torch.full((count,), 5) if kind == "token_posteriors" else None
    return as_stored(pack_posteriors(posteriors(count, seed=samples), 4, reference))


@pytest.mark.parametrize("kind", ["ctc_posteriors", "token_posteriors", "nbest"])
def test_every_kind_goes_through_the_store(tmp_path, kind):
    truth, writer = {}, LabelStore.create(tmp_path, recogniser_info(kind)).writer(0, 1)
    for i, samples in enumerate((8000, 12000, 16000)):
        key = f"rec{i}|0|{samples}|1/1"
        truth[key] = rows_of(kind, samples)
        writer.add(key, truth[key], samples)
    writer.finish()
    store = LabelStore(tmp_path)
    assert store.verify() == []
    assert all(np.array_equal(store.get(key), rows) for key, rows in truth.items())
    report = store.storage_report()
    rows = sum(map(len, truth.values()))
    assert report["value_bytes"] == rows * store.info.width * (4 if kind == "nbest" else 2)
    if kind == "nbest":
        assert "ratio_to_float32" not in report
    else:
        assert report["ratio_to_float32"] == pytest.approx(4 * V / (2 * store.info.width))


def damaged(kind):
    """Yield rows that cannot be and what is said of them."""
    rows = rows_of(kind, 8000)
    if kind == "nbest":
        yield rows[:-1], "does not end"
        yield pack_nbest([([V], -1.0)], 4, ()), "tokens beyond 0"
        twice = np.concatenate([rows[:1], rows[1:6], rows[1:6]])
        yield twice, "one hypothesis twice"
        yield np.concatenate([rows[:1], rows[6:], rows[1:6]]), "not falling"
        return
    lead = int(kind == "token_posteriors")
    for column, value, message in (
        (lead, V, f"class {V}, the teacher has {V}"),
        (lead + 4, 0x7E00, "add up to no 1"),  # NaN
        (lead + 4, 0x3C00, "add up to no 1"),  # 1.0
        (lead + 4, 0xB800, "add up to no 1"),  # -0.5
    ):
        changed = rows.copy()
        changed[1, column] = value
        yield changed, message
    if kind == "ctc_posteriors":
        yield rows[:-1], "10 frames, the teacher's formula gives 11"
        yield np.concatenate([rows, rows[:1]]), "12 frames, the teacher's formula gives 11"


@pytest.mark.parametrize("kind", ["ctc_posteriors", "token_posteriors", "nbest"])
def test_rows_that_cannot_be_are_refused_and_found(tmp_path, kind):
    for i, (rows, message) in enumerate(damaged(kind)):
        folder = tmp_path / str(i)
        writer = LabelStore.create(folder, recogniser_info(kind)).writer(0, 1)
        with pytest.raises(DataError, match=message):
            writer.add("a|0|8000|1/1", rows, 8000)
        # In a file that was written all the same.
        writer.add("a|0|8000|1/1", rows_of(kind, 8000), 8000)
        writer.entries = [type(e)(e.key, rows, e.num_samples) for e in writer.entries]
        writer.finish()
        (problem,) = LabelStore(folder).verify()
        assert message.replace("\\", "") in problem and "'a|0|8000|1/1'" in problem
    writer = LabelStore.create(tmp_path / "short", recogniser_info(kind)).writer(0, 1)
    if kind != "ctc_posteriors":  # whose 11 frames do not fit either
        with pytest.raises(DataError, match="of 500 samples, which give no frame"):
            writer.add("a|0|500|1/1", rows_of(kind, 8000), 500)


def test_a_transcript_without_tokens_has_no_rows(tmp_path):
    writer = LabelStore.create(tmp_path, recogniser_info("token_posteriors")).writer(0, 1)
    writer.add("a|0|8000|1/1", rows_of("token_posteriors", 8000)[:0], 8000)
    writer.finish()
    store = LabelStore(tmp_path)
    assert store.verify() == [] and store.get("a|0|8000|1/1").shape == (0, 10)


def test_sets_from_before_recognisers_are_known_by_the_same_fingerprint(tmp_path):
    # The fingerprint that the commit before these kinds gave to a set of codes.
    info = toy_info()
    assert info.fingerprint == "a09c5fbc4a653e521b86ac9fa86559a9f633fb13f80a1b23a1edaef850283ce2"
    LabelStore.create(tmp_path, info)
    assert set(json.loads((tmp_path / "label_set.json").read_text())) == {
        "kind", "dtype", "width", "dim", "teacher", "teacher_sha256", "layer", "layer_convention", "normalization",
        "frame_formula", "sampling_rate", "num_codebooks", "codebook_size", "quantizer_sha256", "refine_iters",
        "long_utterances", "device", "teacher_dtype", "corpus_fingerprint", "key_kind", "extra", "origin",
        "format_version",
    }  # fmt: skip
    assert (info.row, info.plain_floats) == ("frame", 64)
