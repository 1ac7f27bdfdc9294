"""The records of `spec` as C structures: the header that the library is compiled with, and the bytes of a call.

`make records` writes csrc/cpu/records.h.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch

from ... import spec

# The C names of enumerations and the prefix of their members, which are numbered as `spec` lists them.
ENUMERATIONS = {
    spec.Norm: ("Norm", "NORM_"),
    spec.EpsMode: ("EpsMode", "EPS_"),
    spec.Activation: ("Activation", ""),
    spec.Precision: ("Precision", "PRECISION_"),
    spec.Goodness: ("Goodness", "GOODNESS_"),
    spec.Loss: ("Loss", ""),
    spec.Reduction: ("Reduction", "REDUCE_"),
    spec.Rule: ("Rule", ""),
    spec.Pool: ("Pool", "POOL_"),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class MapsPass(NamedTuple):
    """A pass over the maps of a convolution: what csrc/cpu/maps.h needs of `MapRows`, `Layer`, `Geometry`, `Maps` and
    `MapSlopes`.

    Attributes:
        height, width, pooled_height, pooled_width: of maps in front of the pool and behind it.
        has_gaps: whether there are places in no window.
        finds_pivot: whether the pivot is to be found among the activities.
        z, dz: the product, and its gradient, which may lie in its place.
        bias: what is added to `scale z`; None where z has it.
        place_slope, place_scale: `[rows, pooled_height, pooled_width, channels]` and `[channels]`; with them
            `place_scale place_slope` is added to what the moments' slopes make of an activity's gradient.
        dz_sums: `[rows, channels]`, over places, before the row scale.
        x, weight, dw: a convolution's own, where the library multiplies too; the last two laid out as the parameter.
            Then z is kept where it is not null, with the bias where there is no scale, and dz is never written.
        in_channels, ..., groups: its shape; what a padding pads is zero.
    """

    rows: int
    channels: int
    height: int
    width: int
    pooled_height: int
    pooled_width: int
    pool_height: int
    pool_width: int
    pool_stride_height: int
    pool_stride_width: int
    has_gaps: bool
    pool: spec.Pool
    activation: spec.Activation
    dtype: torch.dtype
    z: spec.AnyMaps
    p: spec.AnyMaps
    where: spec.Winners | None
    scale: spec.Vector | None
    bias: spec.Vector | None
    pivot: spec.WrittenVector | None
    finds_pivot: bool = False
    first: spec.WrittenVector | None = None
    spread: spec.WrittenVector | None = None
    slope_first: spec.Vector | None = None
    slope_second: spec.Vector | None = None
    gain: spec.Vector | None = None
    shift: spec.Vector | None = None
    place_slope: spec.Vector | None = None
    place_scale: spec.Vector | None = None
    dz: spec.AnyMaps | None = None
    dz_sums: spec.WrittenVector | None = None
    x: spec.AnyMaps | None = None
    weight: spec.Vector | None = None
    dw: spec.WrittenVector | None = None
    in_channels: int = 0
    in_height: int = 0
    in_width: int = 0
    kernel_height: int = 0
    kernel_width: int = 0
    padding_height: int = 0
    padding_width: int = 0
    groups: int = 0


# The records of a call, in this order; behind them comes how many threads work on it.
RECORDS = {
    "rows": spec.Rows,
    "layer": spec.Layer,
    "goal": spec.Goal,
    "pull": spec.PeerPull,
    "update": spec.Update,
    "outputs": spec.Outputs,
    "slopes": spec.Slopes,
}
# As many tensors as any optimizer's state has.
STATES = 3


class Member(NamedTuple):
    """A member of a C structure: its type and name, what it is for `struct`, and how its value is made.

    `kind`: "matrix", "vector", "mask", "labels", "maps", "winners", "slot", a dict from values to numbers, or None for
    a number as it is.
    """

    type: str
    name: str
    format: str
    kind: Any
    is_written: bool = False


MATRIX_MEMBERS = (
    ("void*", "at"), ("int64_t", "rows"), ("int64_t", "columns"), ("int64_t", "stride"), ("Dtype", "dtype"),
)  # fmt: skip
MATRIX = "Pqqqi0q"
SLOT = f"{STATES}P{len(spec.Numbers._fields)}d"


def _member(name: str, hint: Any) -> Member:
    (kind,) = [kind for kind in get_args(hint) if kind is not NoneType] if NoneType in get_args(hint) else [hint]
    marks = get_args(kind)[1:] if get_origin(kind) is Annotated else ()
    if "matrix" in marks:
        return Member("Matrix", name, MATRIX, "matrix", "written" in marks)
    if "vector" in marks:
        return Member("float*" if "written" in marks else "const float*", name, "P", "vector", "written" in marks)
    if "mask" in marks:
        return Member("const uint8_t*", name, "P", "mask")
    if "labels" in marks:
        return Member("const int64_t*", name, "P", "labels")
    if "maps" in marks:
        return Member("void*", name, "P", "maps", "written" in marks)
    if "winners" in marks:
        return Member("uint8_t*", name, "P", "winners")
    if kind is spec.Slot:
        return Member("Slot", name, SLOT, "slot")
    if get_origin(kind) is Literal:
        numbers = {value: number for number, value in enumerate(get_args(kind))}
        return Member(ENUMERATIONS[kind][0], name, "i", numbers)
    if kind is torch.dtype:
        return Member("Dtype", name, "i", {dtype: number for number, dtype in enumerate(DTYPES)})
    simple = {float: ("double", "d"), int: ("int64_t", "q"), bool: ("int32_t", "i")}
    return Member(simple[kind][0], name, simple[kind][1], None)


MEMBERS: dict[Any, tuple[Member, ...]] = {
    record: tuple(_member(name, hint) for name, hint in get_type_hints(record, include_extras=True).items())
    for record in (*RECORDS.values(), MapsPass)
}
FORMATS = {record: "".join(member.format for member in members) + "0q" for record, members in MEMBERS.items()}
LAYOUT = struct.Struct("@" + "".join(FORMATS[record] for record in RECORDS.values()) + "i0q")
# The same in parts: rows, what stands between them and the outputs, outputs, and the end.
ROWS_LAYOUT = struct.Struct("@" + FORMATS[spec.Rows])
STEP_LAYOUT = struct.Struct("@" + "".join(FORMATS[of] for of in (spec.Layer, spec.Goal, spec.PeerPull, spec.Update)))
OUTPUTS_LAYOUT = struct.Struct("@" + FORMATS[spec.Outputs])
END_LAYOUT = struct.Struct("@" + FORMATS[spec.Slopes] + "i0q")
NUMBERS_LAYOUT = struct.Struct(f"@{len(spec.Numbers._fields)}d")
PASS_LAYOUT = struct.Struct("@" + FORMATS[MapsPass].removesuffix("0q") + "i0q")


def _places(format: str) -> int:
    """How many values a format takes."""
    return len(struct.unpack("@" + format, bytes(struct.calcsize("@" + format))))


# What stands for a record that a call has no use for, and for a matrix or a slot that is None.
NOTHING = {record: (0,) * _places(format) for record, format in FORMATS.items()}
NO_MATRIX = (0,) * _places(MATRIX)


def header() -> str:
    """The text of csrc/cpu/records.h."""
    lines = []
    for choices, (name, prefix) in ENUMERATIONS.items():
        values = ", ".join(prefix + value.upper() for value in get_args(choices))
        lines.append(f"enum {name} : int32_t {{ {values} }};")
    dtypes = ", ".join(str(dtype).removeprefix("torch.").upper() for dtype in DTYPES)
    lines += [f"enum Dtype : int32_t {{ {dtypes} }};", ""]
    lines += ["// Row-major; rows lie `stride` numbers apart. `at` is null where there is none."]
    lines += _structure("Matrix", ["void* at", "int64_t rows", "int64_t columns", "int64_t stride", "Dtype dtype"])
    lines += _structure("Numbers", [f"double {name}" for name in spec.Numbers._fields])
    lines += _structure("Slot", [f"float* state[{STATES}]", "Numbers numbers"])
    for record in RECORDS.values():
        lines += _structure(record.__name__, _members(record))
    lines += _structure("Call", [*(f"{r.__name__} {name}" for name, r in RECORDS.items()), "int32_t threads"])
    lines += _structure("MapsPass", [*_members(MapsPass), "int32_t threads"])
    lines += ["// Where the members lie, for a test."]
    lines += ["constexpr size_t LAYOUT[] = {", "    sizeof(Call),"]
    lines += [f"    offsetof(Call, {path})," for path, _ in offsets()]
    lines += ["    sizeof(MapsPass),"]
    lines += [f"    offsetof(MapsPass, {path})," for path, _ in pass_offsets()]
    lines += ["};"]
    text = "\n".join(lines)
    # Any change of the text is another interface.
    number = int(hashlib.sha256(text.encode()).hexdigest()[:7], 16)
    return "\n".join([
        "// Made by `make records` from ffkernels/spec.py, which says what each member is.",
        "#pragma once",
        "#include <cstddef>",
        "#include <cstdint>",
        "",
        "namespace ffk {",
        "",
        f"constexpr int INTERFACE = {number};",
        "",
        text,
        "",
        "}  // namespace ffk",
        "",
    ])  # fmt: skip


def interface() -> int:
    """The number of this interface, which a library must have."""
    line = next(line for line in header().splitlines() if "INTERFACE" in line)
    return int(line.split()[-1].rstrip(";"))


def offsets() -> Iterator[tuple[str, int]]:
    """Each member of a call that is no structure, and where it lies."""
    before = "@"

    def at(path: str, format: str) -> tuple[str, int]:
        nonlocal before
        place = struct.calcsize(before + "0" + format[-1])
        before += format
        return path, place

    for name, record in RECORDS.items():
        for member in MEMBERS[record]:
            path = f"{name}.{member.name}"
            if member.kind == "matrix":
                for (_, part), format in zip(MATRIX_MEMBERS, MATRIX, strict=False):
                    yield at(f"{path}.{part}", format)
                before += "0q"
            elif member.kind == "slot":
                yield at(f"{path}.state", f"{STATES}P")
                for number in spec.Numbers._fields:
                    yield at(f"{path}.numbers.{number}", "d")
            else:
                yield at(path, member.format)
        before += "0q"
    yield at("threads", "i")


def pass_offsets() -> Iterator[tuple[str, int]]:
    """Each member of a pass over maps, and where it lies."""
    before = "@"
    for name, format in [*((member.name, member.format) for member in MEMBERS[MapsPass]), ("threads", "i")]:
        yield name, struct.calcsize(before + "0" + format)
        before += format


def _members(record: Any) -> list[str]:
    return [f"{member.type} {member.name}" for member in MEMBERS[record]]


def _structure(name: str, members: list[str]) -> list[str]:
    return [f"struct {name} {{", *(f"    {member};" for member in members), "};", ""]
