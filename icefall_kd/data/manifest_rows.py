"""What a row of a cut set may hold: nothing that would be executed, and values of the types that lhotse assumes.

lhotse believes its manifests.  It runs the command of a recording of type "command" and every path that begins with
"pipe:", hands the names of ``.sph`` files to a shell unquoted, unpickles features of type "memory_raw", and puts
whatever it finds into its objects, to fail much later.  So every row is checked before lhotse sees it.
"""

import re
from typing import Any

from lhotse.cut import Cut, MixedCut, MonoCut, MultiCut, PaddingCut

# Storage of features and arrays that is read without unpickling and without a command; kaldiio's paths may be pipes.
STORAGE = (
    *("lilcom_chunky", "lilcom_files", "lilcom_hdf5", "chunked_lilcom_hdf5", "lilcom_url"),
    *("numpy_files", "numpy_hdf5", "memory_lilcom", "memory_npy", "shar"),
)
SOURCES = ("file", "url", "memory", "shar")
_PLAIN_NAME = re.compile(r"[\w./+=:@%-]*")
_NUMBER, _NOTHING = (int, float), type(None)
_LARGEST = 2**40  # samples, seconds, bytes: anything above is damage

# name -> types, lowest value of numbers, whether it may be absent
_CUT = {"id": (str, 0, False), "duration": (_NUMBER, 0, False)}
_DATA_CUT = {**_CUT, "start": (_NUMBER, 0, False), "custom": ((dict, _NOTHING), 0, True)}
_SUPERVISION = {
    "id": (str, 0, False),
    "recording_id": (str, 0, False),
    "start": (_NUMBER, -_LARGEST, False),
    "duration": (_NUMBER, 0, False),
    "text": ((str, _NOTHING), 0, True),
    "speaker": ((str, _NOTHING), 0, True),
    "language": ((str, _NOTHING), 0, True),
    "custom": ((dict, _NOTHING), 0, True),
}
_RECORDING = {
    "id": (str, 0, False),
    "sampling_rate": (int, 1, False),
    "num_samples": (int, 0, False),
    "duration": (_NUMBER, 0, False),
    "sources": (list, 0, False),
}
_FEATURES = {
    "type": (str, 0, False),
    "num_frames": (int, 0, False),
    "num_features": (int, 1, False),
    "frame_shift": (_NUMBER, 0, True),
    "sampling_rate": (int, 1, False),
    "start": (_NUMBER, 0, False),
    "duration": (_NUMBER, 0, False),
    "storage_path": ((str, _NOTHING), 0, True),
}


def cut_of(row: Any) -> Cut:
    """Return the cut that a row (the plain data of a line of JSON) describes; the row is used up.

    Raises:
        ValueError: it is no cut, holds what would be executed when it is read, or values that no cut has.
    """
    if not isinstance(row, dict) or row.get("type") not in ("MonoCut", "MultiCut", "MixedCut", "Cut"):
        kind = row.get("type") if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"it is no cut (its type is {kind!r})")
    _refuse_commands(row)
    _check_cut(row)
    try:
        if row["type"] == "MixedCut":
            return MixedCut.from_dict(row)
        return (MultiCut if row["type"] == "MultiCut" else MonoCut).from_dict(row)
    except Exception as error:  # whatever a constructor of lhotse makes of values that are none of its own
        raise ValueError(f"{type(error).__name__}: {error}") from error


def refuse_shell_names(path: object) -> None:
    """Raise a ValueError for a name that lhotse would hand to a shell in which it is more than a name."""
    text = str(path)
    if text.startswith("pipe:"):
        raise ValueError(f"{text[:80]!r} would be run as a command; name a file")
    if text.lower().endswith(".sph") and not _PLAIN_NAME.fullmatch(text):
        raise ValueError(f"the name {text!r} is handed to a shell as it stands; rename the file, or convert it to flac")


def _refuse_commands(row: dict) -> None:
    """Look at every object in a row, wherever it stands: recordings occur in transforms and custom fields, too."""
    todo: list[Any] = [row]
    while todo:
        item = todo.pop()
        if isinstance(item, dict):
            if "storage_type" in item:
                if item["storage_type"] not in STORAGE:
                    raise ValueError(f"storage of type {item['storage_type']!r} is not read, since it may run code")
                refuse_shell_names(item.get("storage_path"))
            if "source" in item and "channels" in item:
                if item.get("type") not in SOURCES:
                    raise ValueError(f"a source of type {item.get('type')!r} is not read, since it may run code")
                refuse_shell_names(item["source"])
            todo += item.values()
        elif isinstance(item, list) and item and not isinstance(item[0], int | float | str):
            todo += item


def _check(item: Any, what: str, fields: dict[str, tuple[Any, float, bool]]) -> None:
    if not isinstance(item, dict):
        raise ValueError(f"{what} is {str(item)[:80]!r}")
    for name, (types, lowest, optional) in fields.items():
        if name not in item:
            if optional:
                continue
            raise ValueError(f"{what} has no {name}")
        value = item[name]
        if not isinstance(value, types) or (isinstance(value, _NUMBER) and not lowest <= value < _LARGEST):
            raise ValueError(f"{what} has {name} {str(value)[:80]!r}")


def _check_cut(row: dict) -> None:
    if row["type"] == "MixedCut":
        _check(row, "the cut", {"id": (str, 0, False), "tracks": (list, 0, False)})
        _check_transforms(row.get("transforms"))
        for track in [*row["tracks"], *([row["snr_reference"]] if "snr_reference" in row else [])]:
            _check(track, "a track", {"cut": (dict, 0, False), "type": (str, 0, False), "offset": (_NUMBER, 0, True)})
            if track["type"] == PaddingCut.__name__:
                _check(track["cut"], "a padding", _CUT)
            elif track["type"] in ("MonoCut", "MultiCut", "Cut"):
                _check_data_cut(track["cut"], track["type"])
            else:
                raise ValueError(f"a track is of type {track['type']!r}")
        return
    _check_data_cut(row, row["type"])


def _check_data_cut(row: dict, kind: str) -> None:
    _check(row, "the cut", _DATA_CUT)
    channels = row.get("channel")
    one_by_one = channels if kind == "MultiCut" and isinstance(channels, list) else [channels]
    if not all(isinstance(x, int) and 0 <= x < _LARGEST for x in one_by_one):
        raise ValueError(f"the cut has channel {str(channels)[:80]!r}")
    if row["duration"] == 0:
        raise ValueError("the cut lasts 0 s")
    supervisions = row.get("supervisions", [])
    if not isinstance(supervisions, list):
        raise ValueError(f"the cut has supervisions {str(supervisions)[:80]!r}")
    for supervision in supervisions:
        _check(supervision, "a supervision", _SUPERVISION)
    if "recording" in row:
        _check_recording(row["recording"])
    if "features" in row:
        _check(row["features"], "the features", _FEATURES)


def _check_recording(recording: Any) -> None:
    _check(recording, "the recording", _RECORDING)
    for source in recording["sources"]:
        _check(source, "a source", {"source": (str, 0, False), "channels": (list, 0, False)})
    channels = recording.get("channel_ids")
    if channels is not None and not (isinstance(channels, list) and all(isinstance(x, int) for x in channels)):
        raise ValueError(f"the recording has channel_ids {str(channels)[:80]!r}")
    if abs(recording["num_samples"] - recording["duration"] * recording["sampling_rate"]) > recording["sampling_rate"]:
        raise ValueError(
            f"the recording has {recording['num_samples']} samples, and {recording['duration']} s at "
            f"{recording['sampling_rate']} Hz"
        )
    _check_transforms(recording.get("transforms"))


def _check_transforms(transforms: Any) -> None:
    if transforms is None:
        return
    if not isinstance(transforms, list):
        raise ValueError(f"transforms are {str(transforms)[:80]!r}")
    for transform in transforms:
        _check(transform, "a transform", {"name": (str, 0, False), "kwargs": (dict, 0, False)})
        for name, value in transform["kwargs"].items():
            wanted = int if name.endswith("sampling_rate") else _NUMBER if name == "factor" else None
            if wanted and not (isinstance(value, wanted) and 0 < value < _LARGEST):
                raise ValueError(f"transform {transform['name']} has {name} {str(value)[:80]!r}")
