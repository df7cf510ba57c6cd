"""Reading what cuts point to, ahead of its use in processes; whatever is unreadable is an error that names its cut."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from lhotse.cut import Cut
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from icefall_kd.data.batch import Batch
from icefall_kd.errors import DataError, KdError
from icefall_kd.labels.audio import UNREADABLE
from icefall_kd.runtime.signals import outlive_sigterm


def audio_of(cut: Cut) -> Tensor:
    """Return the waveform (S,) float32 of a cut; a DataError when it cannot be read."""
    with _named(cut, "audio", "restore the file, or prepare the data again to have it rejected"):
        return torch.from_numpy(cut.load_audio()[0]).float()


def features_of(cut: Cut) -> Tensor:
    """Return the stored features (T, C) float32 of a cut; a DataError when they cannot be read."""
    with _named(cut, "stored features", "run the feature stage again with --force"):
        return torch.from_numpy(cut.load_features()).float()


@contextlib.contextmanager
def _named(cut: Cut, what: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except UNREADABLE as error:
        # The messages of lhotse span many lines, and the last one says what happened.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise DataError(f"cut {cut.id}: its {what} cannot be read ({reason}); {remedy}") from error


class Loader:
    """The items of a dataset in the order of ``plans``, read ahead by ``num_workers`` processes."""

    def __init__(self, data: Dataset, plans: Iterable, num_workers: int) -> None:
        self.loader = DataLoader(
            _Caught(data),
            batch_size=None,
            sampler=plans,
            num_workers=num_workers,
            prefetch_factor=4 if num_workers else None,
            worker_init_fn=_single_thread if num_workers else None,
        )

    def __iter__(self) -> Iterator[Batch]:
        return map(_checked, iter(self.loader))


class _Caught(Dataset):
    """Hands an error of this project over as an item: a loader's process would wrap it into its traceback."""

    def __init__(self, data: Dataset) -> None:
        self.data = data

    def __getitem__(self, plan: Any) -> Batch | KdError:
        try:
            return self.data[plan]
        except KdError as error:
            return error


def _checked(item: Batch | KdError) -> Batch:
    if isinstance(item, KdError):
        raise item
    return item


def _single_thread(_worker: int) -> None:
    # Workers share the cores with the training process.
    torch.set_num_threads(1)
    outlive_sigterm()
