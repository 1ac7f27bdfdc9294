"""A run's state on disk: written whole or not at all, and read back only by a run with the same settings."""

from __future__ import annotations

import errno
import io
import os
import secrets
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

FORMAT = 2
LONGEST_VALUE = 200  # characters of a value that an error shows


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Calls `write` on a temporary file beside `path` that then takes its place.

    What fails or is interrupted leaves the old file whole and nothing beside it; a kill may leave the temporary file,
    whose name no other process uses.

    Raises:
        OSError: naming `path`, where it cannot be written.
    """
    # What a link points at is replaced, not the link.
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f"{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise _naming(path, error) from error
        raise


def try_writing(path: Path) -> None:
    """Makes the folder of `path` and sees that a file can be written there; leaves `path` as it is.

    Raises:
        OSError: naming `path` or its folder, where `write_atomically` would fail.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, "there, but no folder", str(path.parent)) from error
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a folder where a file is to be written", str(path))
    trial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with trial.open("xb") as file:
            file.write(b"\0")
    except OSError as error:
        raise _naming(path, error) from error
    finally:
        with suppress(OSError):
            trial.unlink()


def remove_leftovers(paths: Iterable[Path]) -> None:
    """Removes temporary files of `paths` that a killed process has left; nobody may be writing them."""
    for path in paths:
        for leftover in path.parent.glob(f"{path.name}*.tmp"):
            leftover.unlink(missing_ok=True)


def _naming(path: Path, error: OSError) -> OSError:
    if error.errno is None:
        return OSError(f"{path}: cannot be written ({error})")
    return OSError(error.errno, error.strerror, str(path))


def save(path: Path, settings: dict[str, Any], state: dict[str, Any]) -> None:
    """Writes `state` (tensors and plain values) with the settings it belongs to."""
    # torch's writer turns an error of the file into one of its own, which does not say what is wrong.
    content = io.BytesIO()
    torch.save({"format": FORMAT, "settings": settings, "state": state}, content)
    write_atomically(path, lambda file: file.write(content.getbuffer()))


def load(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The state saved at `path`, on the CPU; its structure is for the caller to check.

    Of the data's description only the last parentheses must be the same, so that a folder may be renamed.

    Raises:
        ValueError: for a damaged file, another format, and other settings, each of which is named.
        OSError: where the file cannot be read.
    """
    content = io.BytesIO(path.read_bytes())
    try:
        # torch.load does not look at the checksums that torch.save has written.
        with zipfile.ZipFile(content) as archive:
            broken = archive.testzip()
        if broken is not None:
            raise zipfile.BadZipFile(f"bad checksum of {broken}")
        content.seek(0)
        found = torch.load(content, map_location="cpu", weights_only=True)
        version, saved, state = found["format"], dict(found["settings"]), found["state"]
        names = [name for name in dict.fromkeys([*settings, *saved]) if not _same(name, saved, settings)]
    except Exception as error:  # zipfile, zlib, pickle and torch each have several
        raise damaged(path, f"{type(error).__name__}: {error}") from error
    if not _equal(version, FORMAT):
        raise ValueError(f"{path}: format {_short(version)}, but this version reads format {FORMAT}")
    if names:
        differences = [f"{name} {_short(saved.get(name))}, now {_short(settings.get(name))}" for name in names]
        raise ValueError(f"{path}: a run with other settings: {'; '.join(differences)}")
    return state


def damaged(path: Path, found: str) -> ValueError:
    """The error for a file that is no checkpoint, or no longer one."""
    return ValueError(f"{path}: damaged, or no checkpoint of a training run ({_line(found)})")


def _same(name: str, saved: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    one, other = saved.get(name), settings.get(name)
    if name == "data" and isinstance(one, str) and isinstance(other, str):
        one, other = one.rpartition(" (")[2], other.rpartition(" (")[2]
    return _equal(one, other)


def _equal(one: object, other: object) -> bool:
    try:
        return bool(one == other)
    except RuntimeError:  # a tensor's answer, where a plain value belongs
        return False


def _short(value: object) -> str:
    return _line(repr(value))


def _line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


def module_state(name: str, found: object, module: nn.Module) -> dict[str, Tensor]:
    """`found`, once it is a state that `module` can load whole.

    Raises:
        ValueError: naming the entry that is missing, superfluous or of another kind.
    """
    return _tensors(name, found, module.state_dict())


def optimizer_state(name: str, found: object, optimizer: Optimizer, steps: Sequence[int]) -> dict[str, Any]:
    """What `optimizer` can load whole: the tensors of `found`, with the optimizer's own groups, which must agree.

    Learning rates may differ: they are the epoch's.

    Args:
        name: of the optimizer, for errors.
        found: a `state_dict` from a file.
        optimizer: with the same parameters and options.
        steps: that each of its parameters has taken.

    Raises:
        ValueError: naming the entry that is missing, superfluous or of another kind.
    """
    own = optimizer.state_dict()
    found = _entries(name, found, ("state", "param_groups"))
    groups = found["param_groups"]
    if not isinstance(groups, list) or len(groups) != len(own["param_groups"]):
        raise ValueError(f"{name}.param_groups: {_short(groups)}, not a list of {len(own['param_groups'])}")
    for i, (group, ours) in enumerate(zip(groups, own["param_groups"], strict=True)):
        where = f"{name}.param_groups[{i}]"
        if not isinstance(group, dict):
            raise ValueError(f"{where}: {_short(group)}, not a dict")
        for key, value in ours.items():
            if key == "lr" or (key not in group and key != "params"):
                continue
            if not _equal(group.get(key), value):
                raise ValueError(f"{where}.{key}: {_short(group.get(key))}, not {value!r}")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if isinstance(optimizer, Adam):
        kept = {"step": torch.zeros(()), "exp_avg": None, "exp_avg_sq": None}
    else:
        kept = {"momentum_buffer": None} if any(group["momentum"] for group in optimizer.param_groups) else {}
    state: dict[int, dict[str, Tensor]] = {}
    if kept and (any(steps) or found["state"]):
        early = found["state"] if isinstance(found["state"], dict) else {}
        learning = [i for i in range(len(parameters)) if steps[i] or i in early or not any(steps)]
        entries = _entries(f"{name}.state", found["state"], learning)
        for i in learning:
            parameter = parameters[i]
            like = {key: parameter.detach() if value is None else value for key, value in kept.items()}
            state[i] = _tensors(f"{name}.state[{i}]", entries[i], like)
            if "step" in kept and state[i]["step"].item() != steps[i]:
                raise ValueError(f"{name}.state[{i}].step: {state[i]['step'].item():g}, not {steps[i]}")
    return {"state": state, "param_groups": own["param_groups"]}


def _entries(name: str, found: object, wanted: Iterable[Any]) -> dict[Any, Any]:
    wanted = list(wanted)
    if not isinstance(found, dict):
        raise ValueError(f"{name}: {_short(found)}, not a dict")
    if set(found) != set(wanted):
        raise ValueError(f"{name}: holds {_short(list(found))}, not {_short(wanted)}")
    return found


def _tensors(name: str, found: object, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of the tensors in `found`, each of the dtype and shape of its counterpart in `wanted`."""
    entries, checked = _entries(name, found, wanted), {}
    for key, like in wanted.items():
        tensor = entries[key]
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name}.{key}: {_short(tensor)}, not a tensor")
        kind, right = ((t.dtype, list(t.shape), t.layout) for t in (tensor, like))
        if kind != right or tensor.is_meta:
            place = " on meta" if tensor.is_meta else ""
            raise ValueError(f"{name}.{key}: {kind[0]} {kind[1]} {kind[2]}{place}, not {right[0]} {right[1]}")
        checked[key] = tensor.detach().clone(memory_format=torch.contiguous_format)
    return checked
