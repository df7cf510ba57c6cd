"""Distillation between the modes: by brute force, zero for equal modes, no gradient for the teacher."""

import math

import pytest
import torch

from icefall_kd.losses.dual_kd import ctc_mode_kd, lattice_mode_kd

LENS, Y_LENS = torch.tensor([5, 3]), torch.tensor([3, 1])
Y = torch.tensor([[2, 3, 2], [4, 0, 0]])
POSITIONS = torch.tensor([[0, 0, 1, 2, 2], [0, 0, 0, 0, 0]]).unsqueeze(2) + torch.arange(2)


def three_classes(logits, y, y_len, position):
    """Return the probabilities of the next token (none behind the last), of blank, and of all others."""
    p = logits.softmax(0).tolist()
    wanted = [p[int(y[position])]] if position < y_len else []
    return [*wanted, p[0], 1 - p[0] - sum(wanted)]


def test_three_classes_by_brute_force():
    student, teacher = torch.randn(2, 5, 2, 6) * 2, torch.randn(2, 5, 2, 6) * 2
    expected, nodes = [0.0, 0.0], 0
    for n in range(2):
        for t in range(int(LENS[n])):
            for r in range(2):
                position = int(POSITIONS[n, t, r])
                if position > Y_LENS[n]:
                    continue
                p, q = (three_classes(x[n, t, r], Y[n], Y_LENS[n], position) for x in (teacher, student))
                assert sum(p) == pytest.approx(1) and len(p) == (3 if position < Y_LENS[n] else 2)
                expected[n] += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
                nodes += 1
    loss, rows = lattice_mode_kd(student, teacher, Y, POSITIONS, LENS, Y_LENS)
    assert len(loss) == len(rows) == nodes
    assert [float(loss[rows == n].sum()) for n in range(2)] == pytest.approx(expected, rel=1e-5)


def test_ctc_by_brute_force_without_frames_of_a_sure_blank():
    student, teacher = torch.randn(2, 5, 6) * 2, torch.rand(2, 5, 6)
    teacher[0, 1, 0] = teacher[1, 0, 0] = 12.0
    expected = torch.zeros(2)
    for n in range(2):
        for t in range(int(LENS[n])):
            p, q = teacher[n, t].softmax(0), student[n, t].softmax(0)
            if p[0] <= 0.99:
                expected[n] += (p * (p / q).log()).sum()
    loss, rows = ctc_mode_kd(student, teacher, LENS)
    assert len(loss) == 6
    torch.testing.assert_close(torch.stack([loss[rows == n].sum() for n in range(2)]), expected)
    assert len(ctc_mode_kd(student, teacher, LENS, skip_blank=1.0)[0]) == 8


def test_equal_modes_have_nothing_to_learn_and_the_teacher_never_learns():
    for shape, kd in (
        ((2, 5, 2, 6), lambda s, t: lattice_mode_kd(s, t, Y, POSITIONS, LENS, Y_LENS)),
        ((2, 5, 6), lambda s, t: ctc_mode_kd(s, t, LENS)),
    ):
        student, teacher = (torch.randn(shape, requires_grad=True) for _ in range(2))
        loss, _ = kd(student, teacher)
        assert (loss > 0).all()
        loss.sum().backward()
        assert teacher.grad is None and student.grad.abs().sum() > 0
        student.grad = None
        loss, _ = kd(student, student.detach())
        loss.sum().backward()
        assert loss.abs().max() < 1e-6 and student.grad.abs().max() < 1e-6


def test_utterances_without_text_and_batches_of_blanks_alone_are_defined():
    student, teacher = torch.randn(1, 3, 1, 6, requires_grad=True), torch.randn(1, 3, 1, 6)
    nothing, lens = torch.zeros(1, 0, dtype=torch.int64), torch.tensor([3])
    loss, rows = lattice_mode_kd(student, teacher, nothing, torch.zeros(1, 3, 1, dtype=torch.int64), lens, lens * 0)
    assert loss.shape == (3,) and loss.isfinite().all() and rows.tolist() == [0, 0, 0]
    sure = torch.zeros(1, 3, 6)
    sure[..., 0] = 20.0
    loss, _ = ctc_mode_kd(torch.randn(1, 3, 6, requires_grad=True), sure, lens)
    assert loss.shape == (0,)
    loss.sum().backward()
