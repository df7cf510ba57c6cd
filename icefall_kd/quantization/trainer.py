"""Two-phase training of the quantizer on a matrix of frames; resumable and a function of the seed alone.

Phase 1 trains 2Q codebooks of 16 entries, the switch multiplies neighbours into Q codebooks of 256, and
phase 2 trains those: phases, optimizer and schedule of multi_quantization 0.1.1, the package of the authors
of Guo et al., arXiv 2211.00508.
Frames are centered and divided by their common standard deviation for the training, and the result takes
both back into its parameters (our design): relative errors do not change, and any teacher's scale trains alike.
Outlier frames take no part; the finished quantizer gets entries for them (:mod:`icefall_kd.quantization.outliers`).
"""

import hashlib
import json
import logging
import math
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from icefall_kd.config import QuantizerConfig
from icefall_kd.errors import ConfigError, DataError, NumericError
from icefall_kd.quantization.init import init_from_data
from icefall_kd.quantization.outliers import outlier_mask, place_outliers
from icefall_kd.quantization.quantizer import SCALE_SPEED, Quantizer, QuantizerLosses
from icefall_kd.runtime.files import fingerprint
from icefall_kd.runtime.log import Progress
from icefall_kd.runtime.tensors import read_tensors, write_tensors

logger = logging.getLogger(__name__)

# Changes when the same data and options give another quantizer, so that files of before are not taken for it.
TRAINING_VERSION = 3
PHASE1_ENTRIES = 16
LEARNING_RATES = (0.005, 0.0025)
LARGEST_FLOAT16 = 65504.0
LOGGED = ("reconstruction", "logprob", "entropy")
LOG_STEPS = 50
# Usual frames that tell which entries are used least.
USAGE_FRAMES = 4096


def to_float16(frames: Tensor) -> Tensor:
    """Return frames as float16, which halves the memory of a training set.

    Raises:
        DataError: A value is not finite or does not fit (some teachers have huge outlier channels).
    """
    if len(frames) == 0:
        raise DataError("there are no frames to train the quantizer on")
    largest = frames.abs().amax(dim=0)
    if not torch.isfinite(largest).all():
        channel = int((~torch.isfinite(largest)).nonzero()[0])
        raise DataError(f"embeddings are not finite (channel {channel}); check the teacher and its dtype")
    if largest.max() > LARGEST_FLOAT16:
        raise DataError(f"embedding channel {int(largest.argmax())} reaches {largest.max():.4g}, more than float16 "
                        f"holds ({LARGEST_FLOAT16:.0f}); use --normalize-embeddings true")  # fmt: skip
    return frames.half()


def split_rows(num_frames: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return shuffled row numbers of the training and the validation frames, min(5 %, 10000) of the latter."""
    order = torch.randperm(num_frames, generator=torch.Generator().manual_seed(seed))
    num_valid = min(num_frames // 20, 10000)
    return order[num_valid:], order[:num_valid]


@dataclass(frozen=True)
class Moments:
    """What frames are centered and scaled with."""

    mean: Tensor
    """(C,) float32."""
    std: float
    """Root mean square over all channels of the centered frames."""


def moments(frames: Tensor, rows: Tensor) -> Moments:
    """Return mean and common standard deviation of the chosen rows, summed in float64."""
    total, square = torch.zeros(frames.shape[1], dtype=torch.float64), 0.0
    for part in rows.split(16384):
        total += frames[part].double().sum(dim=0)
    mean = total / len(rows)
    for part in rows.split(16384):
        square += (frames[part].double() - mean).square().sum().item()
    std = (square / (len(rows) * frames.shape[1])) ** 0.5
    if not std > 0 or std == float("inf"):
        raise DataError(f"the embeddings' standard deviation is {std}; the teacher gives constant or broken output")
    return Moments(mean.float(), std)


@torch.no_grad()
def unnormalize(quantizer: Quantizer, stats: Moments) -> None:
    """Make a quantizer of ``(x - mean) / std`` one of x."""
    mean = stats.mean.to(quantizer.centers.device)
    shift = torch.tensor(stats.std).log().item() / SCALE_SPEED
    quantizer.centers_scale += shift
    scale = (SCALE_SPEED * quantizer.centers_scale.double()).exp()
    quantizer.centers += (mean / (scale * quantizer.num_codebooks)).float()
    quantizer.logits_scale -= shift
    scale = (SCALE_SPEED * quantizer.logits_scale.double()).exp()
    bias = quantizer.to_logits.bias.double() - scale * (quantizer.to_logits.weight.double() @ mean.double())
    quantizer.to_logits.bias.copy_(bias)


class QuantizerTrainer:
    """Train a quantizer of ``config`` on frames (F, C), float16 or float32.

    Args:
        frames: embeddings of the training sample, one frame a row.
        config: sizes, steps, seed.
        state_path: file that keeps the state of an unfinished training; None: not resumable.
        save_every: steps between two writes of the state.
        device: where the training runs.
    """

    def __init__(
        self,
        frames: Tensor,
        config: QuantizerConfig,
        state_path: str | Path | None = None,
        save_every: int = 500,
        device: torch.device | str = "cpu",
    ) -> None:
        if frames.ndim != 2 or len(frames) < 2:
            raise DataError(f"the quantizer needs a matrix of frames, got shape {tuple(frames.shape)}")
        if config.num_codebooks not in (1, 2, 4, 8, 16, 32):
            raise ConfigError(f"--num-codebooks is {config.num_codebooks}; it must be 1, 2, 4, 8, 16 or 32")
        if config.frames_per_step < 1 or min(config.phase1_steps, config.phase2_steps) < 0:
            raise ConfigError(f"--frames-per-step {config.frames_per_step}, --phase1-steps {config.phase1_steps}, "
                              f"--phase2-steps {config.phase2_steps}: at least 1, 0 and 0 are needed")  # fmt: skip
        self.frames, self.config, self.device = frames, config, torch.device(device)
        self.state_path = Path(state_path) if state_path is not None else None
        self.save_every = save_every
        self.total_steps = config.phase1_steps + config.phase2_steps
        rows, self.valid_rows = split_rows(len(frames), config.quantizer_seed)
        outliers = outlier_mask(frames, rows)
        self.train_rows, self.outlier_rows = rows[~outliers], rows[outliers]
        if len(self.outlier_rows):
            logger.info("%d of %d training frames are outliers and get entries of their own", outliers.sum(), len(rows))
        self.stats = moments(frames, self.train_rows)
        self.step = 0
        self.quantizer = self._initial()
        self.optimizer = self._new_optimizer()
        self.identity = self._identity()

    def run(self, max_steps: int | None = None, on_step: Callable[[int], None] | None = None) -> Quantizer | None:
        """Train to the end and return the quantizer, on the CPU; the state file is removed by the caller.

        Args:
            max_steps: stop after so many steps of this call (with the state saved) and return None.
            on_step: called with the number of finished steps after each one.
        Raises:
            NumericError: the loss is not finite.
        """
        self.resume()
        start, recent = self.step, []
        progress = Progress(self.total_steps - self.step, "steps", name="quantizer")
        last = self.total_steps if max_steps is None else min(self.total_steps, self.step + max_steps)
        while self.step < last:
            losses = self._train_step()
            recent.append(torch.stack([getattr(losses, name).detach() for name in LOGGED]))
            if self.step % LOG_STEPS == 0 or self.step == last:
                report = self._checked(torch.stack(recent))
                recent = []
                progress.update(min(self.step - start, (self.step - 1) % LOG_STEPS + 1), **report)
            if self.state_path is not None and (self.step % self.save_every == 0 or self.step == last):
                self.save_state()
            if on_step is not None:
                on_step(self.step)
        return self.finish() if self.step == self.total_steps else None

    @torch.no_grad()
    def finish(self) -> Quantizer:
        """Return the trained quantizer for frames as they are, on the CPU."""
        result = Quantizer.from_state_dict({k: v.detach().cpu() for k, v in self.quantizer.state_dict().items()})
        if result.codebook_size == PHASE1_ENTRIES:
            result = result.to_product()
        usual, outliers = (self._normalize(self.frames[rows]).cpu() for rows in
                           (self.train_rows[:USAGE_FRAMES], self.outlier_rows))  # fmt: skip
        place_outliers(result, outliers, usual, self.config.quantizer_seed)
        unnormalize(result, self.stats)
        result.stamp_id()
        return result

    def save_state(self) -> None:
        """Write parameters, optimizer and step, atomically."""
        tensors = {f"model.{name}": value for name, value in self.quantizer.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors.update({f"optimizer.{index}.{name}": value for name, value in state.items()})
        header = {"step": str(self.step), "identity": self.identity}
        write_tensors(self.state_path, tensors, header)

    def resume(self) -> bool:
        """Go on from the state file, if it is sound and of the same data and options; say so when it is not."""
        if self.state_path is None or not self.state_path.exists():
            return False
        try:
            header, tensors = read_tensors(self.state_path)
        except DataError as error:
            logger.warning("%s; training starts anew", error)
            return False
        if header.get("identity") != self.identity:
            logger.warning("%s belongs to other data or options; training starts anew", self.state_path)
            return False
        self.step = int(header["step"])
        if self.step > self.config.phase1_steps:
            self._switch()
        model = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
        self.quantizer.load_state_dict(model)
        states: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".")
                states.setdefault(int(index), {})[key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": states, "param_groups": groups})
        logger.info("quantizer training goes on at step %d of %d", self.step, self.total_steps)
        return True

    def batch(self, step: int) -> Tensor:
        """Return the normalised frames (N, C) of a step: consecutive windows of the shuffled rows, cycling."""
        size, count = self.config.frames_per_step, len(self.train_rows)
        rows = self.train_rows[torch.arange(step * size, (step + 1) * size) % count]
        return self._normalize(self.frames[rows])

    def _normalize(self, frames: Tensor) -> Tensor:
        return ((frames.float() - self.stats.mean) / self.stats.std).to(self.device)

    def _train_step(self) -> QuantizerLosses:
        config = self.config
        if self.step == config.phase1_steps:
            self._switch()
        phase = int(self.step >= config.phase1_steps)
        steps = (config.phase1_steps, config.phase2_steps)[phase]
        in_phase = self.step - phase * config.phase1_steps
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATES[phase] * 0.5 ** (in_phase // max(1, steps // 4))
        # A function of seed and step, so that a resumed training needs no generator state.
        rounds = 2 if random.Random(f"{config.quantizer_seed}-{self.step}").random() < 0.5 else 1
        losses = self.quantizer.losses(self.batch(self.step), rounds)
        self.optimizer.zero_grad(set_to_none=True)
        losses.total(config.entropy_scale).backward()
        self.optimizer.step()
        self.step += 1
        return losses

    def _checked(self, recent: Tensor) -> dict[str, float]:
        """Return the mean losses of the last steps; a single batch would be too noisy a figure."""
        report = dict(zip(LOGGED, recent.mean(dim=0).tolist(), strict=True))
        if not all(math.isfinite(value) for value in report.values()):
            raise NumericError(f"quantizer training diverged before step {self.step}: {report}; "
                               "look for outliers in the embeddings (--normalize-embeddings true)")  # fmt: skip
        return report

    def _initial(self) -> Quantizer:
        config = self.config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.quantizer_seed)
            quantizer = Quantizer(self.frames.shape[1], 2 * config.num_codebooks, PHASE1_ENTRIES)
        if config.quantizer_init == "data":
            sample = self._normalize(self.frames[self.train_rows[:8192]]).cpu()
            init_from_data(quantizer, sample, config.quantizer_seed)
        return quantizer.to(self.device)

    def _switch(self) -> None:
        with torch.random.fork_rng(devices=[]):
            self.quantizer = self.quantizer.to_product()
        self.optimizer = self._new_optimizer()

    def _new_optimizer(self) -> torch.optim.Adam:
        return torch.optim.Adam(
            self.quantizer.parameters(), lr=LEARNING_RATES[0], betas=(0.9, 0.98), eps=1e-9, weight_decay=1e-6
        )

    def _identity(self) -> str:
        digest = hashlib.sha256()
        for part in self.frames.split(65536):
            digest.update(part.contiguous().numpy().tobytes())
        frames = [list(self.frames.shape), str(self.frames.dtype), digest.hexdigest()]
        config = json.loads(json.dumps(asdict(self.config)))
        return fingerprint({"frames": frames, "config": config, "training": TRAINING_VERSION})
