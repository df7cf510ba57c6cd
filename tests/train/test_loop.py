import dataclasses
import json
import logging
import math
import os
import re
import signal

import pytest
import torch

from icefall_kd.errors import ConfigError, DataError, NumericError
from icefall_kd.runtime.files import file_lock, read_json
from icefall_kd.train import guards, loop
from icefall_kd.train.average import average_checkpoints, best_n, last_n
from icefall_kd.train.checkpoint import list_checkpoints, load_checkpoint
from icefall_kd.train.loop import train
from icefall_kd.train.metrics import read_metrics
from icefall_kd.train.progress import TrainProgress
from icefall_kd.train.state import TrainState
from icefall_kd.train.step import Stepper, Wishes, step_seed
from tests.train.toy import ToyData, ToySystem, run_toy, same_weights, toy_config

OPTIMIZERS = ["scaled_adam", "adamw"]


def losses(exp_dir):
    """Return step -> (loss, lr, grad norm, running loss) as logged."""
    records = read_metrics(exp_dir / "log" / "metrics.jsonl", "train")
    assert [r["step"] for r in records] == sorted({r["step"] for r in records})
    return {r["step"]: (r["loss"], r["lr"], r["grad_norm"], r["tot"]["loss"]) for r in records}


@pytest.mark.parametrize(
    ("optimizer", "stop", "accum_grad"),
    # within an epoch, at its end, right after it, and with batches accumulated
    [("scaled_adam", 3, 1), ("scaled_adam", 7, 1), ("adamw", 8, 1), ("adamw", 20, 1), ("scaled_adam", 5, 2)],
)
def test_stopped_at_any_step_and_resumed_is_bit_equal(tmp_path, optimizer, stop, accum_grad):
    whole, system = run_toy(tmp_path / "whole", optimizer=optimizer, accum_grad=accum_grad)
    run_toy(tmp_path / "parts", optimizer=optimizer, accum_grad=accum_grad, max_steps=stop)
    result, resumed = run_toy(tmp_path / "parts", optimizer=optimizer, accum_grad=accum_grad)
    assert same_weights(system.state_dict(), resumed.state_dict())
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    for key in ("train_loss", "valid", "steps", "epochs", "best_valid_epoch"):
        assert result[key] == whole[key]
    a, b = (load_checkpoint(tmp_path / d / "epoch-3.pt") for d in ("whole", "parts"))
    assert same_weights(a["model_avg"], b["model_avg"])


def test_the_loss_falls_and_everything_is_written(tmp_path):
    called = []
    torch.manual_seed(7)
    config = toy_config(tmp_path, "adamw", num_epochs=6)
    result = train(ToySystem(), ToyData(), config, tokenizer_hash="abc", on_start=lambda: called.append(1))
    records = read_metrics(tmp_path / "log" / "metrics.jsonl")
    train_losses = [r["loss"] for r in records if r["kind"] == "train"]
    assert train_losses[-1] < 0.6 * train_losses[0]
    assert called == [1] and result["finished"] and result["steps"] == 42 and result["epochs"] == 6
    assert list(list_checkpoints(tmp_path, "epoch")) == [1, 2, 3, 4, 5, 6]
    assert list(list_checkpoints(tmp_path, "checkpoint")) == [4, 8, 12, 16, 20, 24, 28, 32, 36, 40]
    assert read_json(tmp_path / "train_summary.json")["valid"] == result["valid"]
    saved = read_json(tmp_path / "config.json")
    assert saved["seed"] == 42 and saved["config"]["num_epochs"] == 6 and saved["environment"]["packages"]["torch"]
    assert any((tmp_path / "tensorboard").iterdir())
    checkpoint = load_checkpoint(tmp_path / "epoch-6.pt")
    assert set(checkpoint) == set(
        "model model_avg optimizer scheduler grad_scaler train config tokenizer_hash format_version".split()
    )
    assert checkpoint["train"]["valid"] == result["valid"]
    assert [h["epoch"] for h in checkpoint["train"]["history"]] == [1, 2, 3, 4, 5, 6]
    best = min(checkpoint["train"]["history"], key=lambda h: h["valid"]["loss"])
    assert load_checkpoint(tmp_path / "best-valid-loss.pt")["train"]["epoch"] == best["epoch"] + 1
    assert result["audio_hours"] == pytest.approx(42 * 4 * 0.1 / 3600)


def test_a_finished_training_is_left_alone(tmp_path):
    first, system = run_toy(tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    data = ToyData()
    again, same = run_toy(tmp_path, data)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
    assert data.num_read == 0
    assert same_weights(system.state_dict(), same.state_dict())
    assert again["finished"] and again["valid"] == first["valid"] and again["train_loss"] == first["train_loss"]
    more, _ = run_toy(tmp_path, num_epochs=4)
    assert more["epochs"] == 4 and more["steps"] == 28


def test_records_of_a_finished_training_that_were_cut_off_are_written_again(tmp_path, caplog):
    run_toy(tmp_path)
    summary = read_json(tmp_path / "train_summary.json")
    os.truncate(tmp_path / "train_summary.json", 20)
    called = []
    train(ToySystem(), ToyData(), toy_config(tmp_path), tokenizer_hash="abc", on_start=lambda: called.append(1))
    again = read_json(tmp_path / "train_summary.json")
    assert called == [1] and all(again[k] == summary[k] for k in ("train_loss", "valid", "steps", "seconds"))
    os.truncate(tmp_path / "config.json", 20)
    more, _ = run_toy(tmp_path, num_epochs=4)
    assert more["steps"] == 28 and "config.json is written anew" in caplog.text
    assert len(read_json(tmp_path / "config.json")["runs"]) == 1


def test_a_second_training_in_the_same_exp_dir_is_refused_until_the_first_has_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "LOCK_PATIENCE", 0.1)
    with file_lock(tmp_path / ".lock"), pytest.raises(ConfigError, match=r"another process trains in .*; wait"):
        run_toy(tmp_path, max_steps=2)
    assert not list(tmp_path.glob("*.pt")) and not (tmp_path / "config.json").exists()
    for steps in (2, 4):  # in one process, too, one may follow another
        assert run_toy(tmp_path, max_steps=steps)[0]["steps"] == steps


def test_skipped_batches_are_not_read_at_resume(tmp_path):
    run_toy(tmp_path, max_steps=5, oom_scan=False)
    data = ToyData()
    run_toy(tmp_path, data, max_steps=6, oom_scan=False)
    assert data.num_read <= 1 + 1 + 2  # the batch trained, the one ahead of it, and validation


def test_the_scan_validation_and_logging_do_not_change_the_result(tmp_path):
    _, plain = run_toy(tmp_path / "a", oom_scan=False, log_interval=100)
    _, busy = run_toy(tmp_path / "b", oom_scan=True, valid_interval=2, log_interval=1, save_every_n=1)
    assert same_weights(plain.state_dict(), busy.state_dict())


def test_batches_accumulated_equal_one_large_batch(tmp_path):
    class Halves(ToyData):
        def train_batches(self, epoch, skip):
            for index in range(skip // 2, self.num_batches):
                for rank in (0, 1):
                    batch = self._batch(epoch, index)
                    pick = slice(rank, None, 2)
                    yield type(batch)(
                        ids=batch.ids[pick],
                        features=batch.features[pick],
                        x_lens=batch.x_lens[pick],
                        y=batch.y[pick],
                        durations=batch.durations[pick],
                    )

    for optimizer in OPTIMIZERS:
        _, one = run_toy(tmp_path / optimizer / "a", dropout=0.0, optimizer=optimizer)
        _, two = run_toy(tmp_path / optimizer / "b", Halves(), dropout=0.0, optimizer=optimizer, accum_grad=2)
        for name in ("encoder.0.weight", "output.bias", "scale"):
            torch.testing.assert_close(one.state_dict()[name], two.state_dict()[name], rtol=1e-4, atol=1e-6)


def test_options_that_matter_may_not_change(tmp_path):
    run_toy(tmp_path, max_steps=3)
    with pytest.raises(ConfigError, match=r"--base-lr: 0\.02 -> 0\.01"):
        run_toy(tmp_path, optim_base_lr=0.01)
    with pytest.raises(ConfigError, match="--seed: 42 -> 43"):
        run_toy(tmp_path, seed=43)
    result, _ = run_toy(tmp_path, num_epochs=2, log_interval=2, save_every_n=3, keep_last_k=1, data_num_workers=0)
    assert result["finished"] and list(list_checkpoints(tmp_path, "checkpoint")) == [12]


def test_other_data_and_another_tokenizer_are_refused(tmp_path):
    run_toy(tmp_path, max_steps=3)
    other = ToyData()
    other.fingerprint = "other"
    with pytest.raises(DataError, match="train: toy -> other"):
        run_toy(tmp_path, other)
    with pytest.raises(ConfigError, match="tokenizer abc, this run uses xyz"):
        train(ToySystem(), ToyData(), toy_config(tmp_path), tokenizer_hash="xyz")


@pytest.mark.parametrize("oom_scan", [True, False])
def test_unused_parameters_are_named(tmp_path, oom_scan):
    with pytest.raises(ConfigError, match=r"2 parameters .*: forgotten\.weight, forgotten\.bias"):
        train(ToySystem(unused=True), ToyData(), toy_config(tmp_path, oom_scan=oom_scan))


def test_a_non_finite_batch_is_skipped_and_named(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        result, system = run_toy(tmp_path, ToyData(inf_at=[(1, 2, 0), (2, 3, 0)]))
    assert result["skipped_steps"] == 2 and result["steps"] == 21 and result["finished"]
    assert "ce_loss is nan in utt-1-2-0" in caplog.text
    assert all(torch.isfinite(v).all() for v in system.state_dict().values())


def test_too_many_non_finite_steps_stop_with_a_dump(tmp_path):
    data = ToyData(inf_at=[(1, i, 0) for i in range(1, 7)])
    with pytest.raises(NumericError, match="3 steps in a row were not finite, the last at step 3: ce_loss") as info:
        run_toy(tmp_path, data, max_skips=2)
    assert info.value.exit_code == 3
    dump = read_json(tmp_path / "nonfinite-step3-rank0.json")
    assert [x["step"] for x in dump["skipped"]] == [1, 2, 3]
    assert dump["skipped"][0]["terms"]["ce_loss"]["utterances"] == ["utt-1-1-0"]


def test_skips_that_are_not_in_a_row_go_on(tmp_path):
    data = ToyData(inf_at=[(1, i, 0) for i in (0, 1, 3, 4, 6)] + [(2, 0, 0)])
    assert run_toy(tmp_path, data, max_skips=2)[0]["skipped_steps"] == 6


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_non_finite_gradient_is_skipped(tmp_path, optimizer):
    class Exploding(ToySystem):
        def losses(self, batch, step):
            terms = super().losses(batch, step)
            if step == 4 and self.training:
                self.output.bias.register_hook(self._explode)
            return terms

        def _explode(self, grad):
            if not self.exploded:
                self.exploded = True
                return grad * math.inf
            return grad

    torch.manual_seed(7)
    system = Exploding()
    system.exploded = False
    result = train(system, ToyData(), toy_config(tmp_path, optimizer))
    assert result["skipped_steps"] == 1
    assert all(torch.isfinite(v).all() for v in system.state_dict().values())


def test_running_out_of_memory_leaves_shapes_and_a_suggestion(tmp_path):
    class Hungry(ToySystem):
        def losses(self, batch, step):
            if self.hungry_at == (step, self.training):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB")
            return super().losses(batch, step)

    cases = (((0, True), "in the scan", "scan"), ((5, True), "at step 5", "step5"), ((7, False), "in valid", "step7"))
    for hungry_at, where, name in cases:
        system = Hungry()
        system.hungry_at = hungry_at
        exp_dir = tmp_path / name
        with pytest.raises(ConfigError, match=rf"out of memory {where}.*--max-duration 0\.3 \(now 100\)"):
            train(system, ToyData(), toy_config(exp_dir, oom_scan=name == "scan"))
        dump = read_json(exp_dir / f"oom-{name}-rank0.json")
        assert dump["suggested_max_duration"] == 0.3 and dump["batch"]["features"] == [4, 12, 8]
        assert len(dump["batch"]["ids"]) == 4 and "audio" not in dump["batch"]


def test_out_of_memory_in_the_optimizer_is_explained_too(tmp_path, monkeypatch):
    def step(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("icefall_kd.train.optim.ScaledAdam.step", step)
    with pytest.raises(ConfigError, match=r"out of memory at step 0.*--max-duration"):
        run_toy(tmp_path)


def test_a_signal_saves_and_the_same_command_goes_on(tmp_path, caplog):
    class Signalled(ToyData):
        def train_batches(self, epoch, skip):
            for i, batch in enumerate(super().train_batches(epoch, skip)):
                if (epoch, i + skip) == (2, 3):
                    os.kill(os.getpid(), self.signal)
                yield batch

    _, whole = run_toy(tmp_path / "whole")
    for number in (signal.SIGTERM, signal.SIGUSR1):
        exp_dir = tmp_path / number.name
        handler = signal.getsignal(number)
        data = Signalled()
        data.signal = number
        with caplog.at_level(logging.WARNING):
            result, _ = run_toy(exp_dir, data)
        assert not result["finished"] and f"stopped by {number.name} after step" in caplog.text
        assert signal.getsignal(number) == handler
        assert not (exp_dir / "train_summary.json").exists()
        assert result["steps"] in (10, 11) and (exp_dir / f"checkpoint-{result['steps']}.pt").exists()
        result, resumed = run_toy(exp_dir)
        assert result["finished"] and same_weights(whole.state_dict(), resumed.state_dict())


def test_a_signal_during_validation_saves_before_it(tmp_path):
    class Signalled(ToyData):
        def valid_batches(self):
            os.kill(os.getpid(), signal.SIGTERM)
            yield from super().valid_batches()

    _, whole = run_toy(tmp_path / "whole")
    result, _ = run_toy(tmp_path / "parts", Signalled())
    assert not result["finished"] and result["steps"] == 7 and result["epochs"] == 0
    result, resumed = run_toy(tmp_path / "parts")
    assert same_weights(whole.state_dict(), resumed.state_dict())
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


class SignalledData(ToyData):
    """Sends ``signal`` to its process ``where`` the loop asks for batches."""

    def __init__(self, number, where):
        super().__init__()
        self.number, self.where = number, where

    def _send(self, where):
        if where == self.where:
            os.kill(os.getpid(), self.number)

    def train_batches(self, epoch, skip):
        for i, batch in enumerate(super().train_batches(epoch, skip)):
            self._send(f"batch {epoch} {i + skip}")
            yield batch

    def valid_batches(self):
        self._send("validation")
        yield from super().valid_batches()

    def worst_batches(self):
        self._send("scan")
        return super().worst_batches()


def test_a_signal_during_the_scan_saves_after_the_first_step(tmp_path):
    _, whole = run_toy(tmp_path / "whole")
    for number in (signal.SIGTERM, signal.SIGUSR1):
        exp_dir = tmp_path / number.name
        result, _ = run_toy(exp_dir, SignalledData(number, "scan"))
        assert not result["finished"] and result["steps"] == 1
        assert list(list_checkpoints(exp_dir, "checkpoint")) == [1]
        result, resumed = run_toy(exp_dir)
        assert result["finished"] and same_weights(whole.state_dict(), resumed.state_dict())


@pytest.mark.parametrize(
    ("where", "extra"), [("scan", [1]), ("batch 2 2", [9]), ("validation", [15]), ("nowhere", [])]
)
def test_sigusr2_saves_and_goes_on(tmp_path, where, extra):
    _, whole = run_toy(tmp_path / "whole")
    result, system = run_toy(tmp_path / "saved", SignalledData(signal.SIGUSR2, where))
    assert result["finished"] and same_weights(whole.state_dict(), system.state_dict())
    saved, usual = (set(list_checkpoints(tmp_path / name, "checkpoint")) for name in ("saved", "whole"))
    assert sorted(saved - usual) == extra


class ScriptedValidation(ToyData):
    """Validation losses that fall and rise as ``noise`` says, an epoch each."""

    noise = (3.0, 0.0, 6.0, 0.5, 4.0, 5.0)

    def __init__(self):
        super().__init__()
        self.validations = 0

    def valid_batches(self):
        scale = self.noise[self.validations]
        self.validations += 1
        for batch in super().valid_batches():
            yield dataclasses.replace(batch, features=batch.features + scale * torch.randn(batch.features.shape))


def test_the_last_and_the_best_epochs_are_kept_and_averaged(tmp_path):
    result, _ = run_toy(tmp_path, ScriptedValidation(), num_epochs=6, keep_epochs=2, keep_best=2)
    history = load_checkpoint(tmp_path / "epoch-6.pt")["train"]["history"]
    best = [h["epoch"] for h in sorted(history, key=lambda h: h["valid"]["loss"])][:2]
    assert result["best_valid_epoch"] == best[0] and not set(best) & {5, 6}
    kept = list_checkpoints(tmp_path, "epoch")
    assert list(kept) == sorted({*best, 5, 6})
    assert [p.name for p in best_n(tmp_path, 2)] == [f"epoch-{n}.pt" for n in best]
    assert [p.name for p in last_n(tmp_path, 2)] == ["epoch-5.pt", "epoch-6.pt"]
    mean = average_checkpoints(best_n(tmp_path, 2))["output.bias"]
    files = [load_checkpoint(kept[n])["model"]["output.bias"].double() for n in best]
    torch.testing.assert_close(mean.double(), sum(files) / 2, rtol=1e-6, atol=1e-7)
    # Fewer are wanted now: a training that goes on deletes the rest.
    run_toy(tmp_path, ToyData(), num_epochs=7, keep_epochs=1, keep_best=0)
    assert list(list_checkpoints(tmp_path, "epoch")) == [7]


def test_gradients_that_overflow_for_ever_end_the_training_and_name_the_utterances(tmp_path):
    class Overflowing(ToySystem):
        def losses(self, batch, step):
            terms = super().losses(batch, step)
            if self.training and step >= 3:
                self.scale.register_hook(lambda grad: grad * math.inf)
            return terms

    with pytest.raises(NumericError, match=r"the fp16 loss scale fell to .* at step \d+: .* utt-\d-\d-0, ") as info:
        train(Overflowing(), ToyData(), toy_config(tmp_path, precision="fp16", oom_scan=False))
    assert info.value.exit_code == 3
    (file,) = tmp_path.glob("nonfinite-step*-rank0.json")
    assert len(read_json(file)["batches"][0]["ids"]) == 4 and file.name in str(info.value)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_scan_holds_the_memory_that_the_optimizer_will_take(tmp_path, optimizer, monkeypatch):
    def state_bytes():
        kept = stepper.optimizer.state_dict()["state"]
        rows = kept if isinstance(kept, list) else kept.values()
        return sum(t.nbytes for row in rows for t in row.values() if t.ndim and t.numel() > 4)

    stepper = Stepper(ToySystem(), toy_config(tmp_path, optimizer), torch.device("cpu"))
    before = state_bytes()
    promised = stepper.memory_to_come()
    stepper.step([ToyData()._batch(1, 0)], 0, 1, False, Wishes())
    assert before + promised == pytest.approx(state_bytes(), rel=0.1)
    assert stepper.memory_to_come() == 0

    def no_room(*size, **options):
        if options.get("dtype") == torch.uint8:
            assert size == (promised,)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return empty(*size, **options)

    empty = torch.empty
    monkeypatch.setattr(guards.torch, "empty", no_room)
    with pytest.raises(ConfigError, match=r"out of memory in the scan .*--max-duration"):
        run_toy(tmp_path / "scan", optimizer=optimizer)


class NanValidation(ToyData):
    """The first ``num_bad`` validations hold a NaN."""

    num_bad = 1

    def valid_batches(self):
        self.num_bad -= 1
        for batch in super().valid_batches():
            if self.num_bad >= 0:
                batch.features[0, 0, 0] = math.nan
            yield batch


def test_a_validation_that_is_not_finite_is_never_the_best(tmp_path):
    result, _ = run_toy(tmp_path, NanValidation())
    history = load_checkpoint(tmp_path / "epoch-3.pt")["train"]["history"]
    assert math.isnan(history[0]["valid"]["loss"])
    assert result["best_valid_epoch"] == min(history[1:], key=lambda h: h["valid"]["loss"])["epoch"]
    assert (tmp_path / "best-valid-loss.pt").samefile(tmp_path / f"epoch-{result['best_valid_epoch']}.pt")


def test_the_summary_says_null_where_there_is_no_number(tmp_path):
    result, _ = run_toy(tmp_path / "valid", NanValidation(), num_epochs=1)
    assert result["finished"] and result["best_valid_epoch"] is None
    assert read_json(tmp_path / "valid" / "train_summary.json")["valid"]["loss"] is None
    run_toy(tmp_path / "train", ToyData(inf_at=[(1, i, 0) for i in range(7)]), num_epochs=1)
    assert read_json(tmp_path / "train" / "train_summary.json")["train_loss"] is None


def test_a_training_that_goes_on_has_no_summary_until_its_end(tmp_path):
    run_toy(tmp_path, num_epochs=1)
    with pytest.raises(RuntimeError, match="planted"):
        run_toy(tmp_path, ToyData(fail_at=(2, 3, 0)), num_epochs=2)
    assert not (tmp_path / "train_summary.json").exists()
    run_toy(tmp_path, num_epochs=2)
    assert read_json(tmp_path / "train_summary.json")["epochs"] == 2


def test_a_start_epoch_that_the_exp_dir_does_not_reach_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"--start-epoch is 2, but .* no training that got so far; leave it out"):
        run_toy(tmp_path, start_epoch=2)
    run_toy(tmp_path, num_epochs=1)
    assert run_toy(tmp_path, num_epochs=2, start_epoch=2)[0]["epochs"] == 2
    assert run_toy(tmp_path, num_epochs=3, start_epoch=2)[0]["epochs"] == 3


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reduced_precision_trains_and_resumes(tmp_path, precision):
    options = {"precision": precision, "optim_base_lr": 0.1, "log_interval": 10}
    whole, system = run_toy(tmp_path / "a", **options)
    run_toy(tmp_path / "b", max_steps=10, **options)
    _, resumed = run_toy(tmp_path / "b", **options)
    assert same_weights(system.state_dict(), resumed.state_dict())
    assert whole["valid"]["loss"] < 1.3 and system.output.weight.dtype == torch.float32


def test_the_log_line(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        run_toy(tmp_path, num_epochs=2)
    line = next(r.message for r in caplog.records if r.message.startswith("Epoch 2, batch 3, step 10, loss["))
    number = r"[\d.e+-]+"
    assert re.fullmatch(
        rf"Epoch 2, batch 3, step 10, loss\[loss={number}, ce_loss={number}, logged_only={number}, accuracy={number}, "
        rf"ce_bounded={number} \(bound 1\.609\), over \d+ frames\], tot_loss\[loss={number}\], batch size: 4, "
        rf"lr: {number}, grad_norm: {number}, {number} audio hours/hour, memory: {number} GiB, ETA: {number} s",
        line,
    ), line


def test_the_first_epoch_knows_its_time_left_from_its_audio(tmp_path, caplog):
    def etas(folder, epoch_seconds):
        caplog.clear()
        torch.manual_seed(7)
        with caplog.at_level(logging.INFO):
            train(ToySystem(), ToyData(), toy_config(folder, num_epochs=2), epoch_seconds=epoch_seconds)
        return [r.message.split("ETA: ")[1] for r in caplog.records if "ETA: " in r.message]

    assert etas(tmp_path / "a", None)[:7] == ["unknown"] * 7
    # 7 batches of 4 times 0.1 s
    known = etas(tmp_path / "b", 2.8)
    assert len(known) == 14 and all(text.endswith(" s") for text in known) and known[-1] == "0.0 s"


def test_the_time_left_is_the_pace_times_the_steps_left(tmp_path):
    config = toy_config(tmp_path, num_epochs=4, accum_grad=2)
    progress = TrainProgress(config.loop, Stepper(ToySystem(), config, torch.device("cpu")), epoch_seconds=100.0)
    state = TrainState(step=10, batch=20, audio_seconds=40.0)
    progress.start(TrainState(step=5))
    # 20 batches were 40 of 100 s: 50 batches an epoch, 180 left in two a step, 2 s each
    assert progress._eta(state, progress.started + 10.0) == pytest.approx(90 * 2.0)
    state.batches_per_epoch = 30
    assert progress._eta(state, progress.started + 10.0) == pytest.approx(50 * 2.0)
    assert progress._eta(TrainState(step=5), progress.started + 10.0) is None


def test_an_empty_epoch_is_an_error(tmp_path):
    with pytest.raises(DataError, match="epoch 1 has no training batches"):
        run_toy(tmp_path, ToyData(num_batches=0))


def test_step_seeds_differ_between_seeds_steps_and_ranks():
    seeds = {step_seed(s, k, r) for s in range(5) for k in range(50) for r in range(4)}
    assert len(seeds) == 1000 and all(0 <= s < 2**63 for s in seeds)


def test_metrics_of_steps_after_the_checkpoint_are_dropped_at_resume(tmp_path):
    run_toy(tmp_path, max_steps=6)
    with open(tmp_path / "log" / "metrics.jsonl", "a") as f:
        f.write(json.dumps({"kind": "train", "step": 9, "loss": 1.0}) + "\n" + '{"kind": "tra')
    run_toy(tmp_path)
    assert losses(tmp_path)[9][0] != 1.0, "step 9 is logged once, by the resumed run"


@pytest.mark.parametrize("killed", [True, False])
def test_a_validation_that_comes_again_is_recorded_once(tmp_path, killed, monkeypatch):
    """Behind the checkpoint of the last step of an epoch: killed before that of the epoch, or ended by max_steps."""

    def records(exp_dir):
        return [(r["kind"], r["step"], r["loss"]) for r in read_metrics(exp_dir / "log" / "metrics.jsonl")]

    run_toy(tmp_path / "whole")
    def end(_):
        raise KeyboardInterrupt  # no signal: where tests run in the background, SIGINT is ignored

    if killed:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(loop._Trainer, "_end_epoch", end)
            run_toy(tmp_path / "parts", save_every_n=7)
    else:
        run_toy(tmp_path / "parts", max_steps=7)
    assert records(tmp_path / "parts")[-1][:2] == ("valid", 7) and not (tmp_path / "parts/epoch-1.pt").exists()
    run_toy(tmp_path / "parts", save_every_n=7)
    assert records(tmp_path / "parts") == records(tmp_path / "whole")
