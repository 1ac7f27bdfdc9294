"""Compiles the kernels for devices that need not be there, and reads what the compilers made of them.

`python -m tests.triton_aot` prints the table of all shipped configurations; with `--write` it becomes the one that
`test_triton_compiled.py` holds later compilations against.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
import triton.backends.nvidia
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ffkernels.backends.triton import configs, conv, launch, records
from ffkernels.backends.triton.configs import Config

TABLE = Path(__file__).with_name("triton_machine_code.json")

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
UNTUNED = {"gfx90a": GPUTarget("hip", "gfx90a", 64)}
SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
LANGUAGE = {"float32": tl.float32, "bfloat16": tl.bfloat16, "float16": tl.float16}

# The kernels' arguments that are records, and the one that is a record of its own within another.
RECORDS = {
    "rows": records.Batch, "layer": records.Linear, "shared": records.Shared, "classes": records.ClassSums,
    "activities": records.Kept,
    "made": records.Coefficients, "first": records.Slope, "second": records.Slope, "basis": records.Basis,
    "terms": records.Terms, "peers": records.Pull, "weight": records.Parameter, "bias": records.Parameter,
    "parts": records.Parts,
    "images": records.Images, "kernels": records.Kernels, "mapped": records.Mapped, "maps": records.KeptMaps,
}  # fmt: skip
WRITTEN = {"forward_kernel": records.Forwarded}
NUMBERS = {"sgd": records.Sgd, "grad": None}
ROW_POINTERS = {"x_pos", "x_neg", "x"}
COMPUTE_POINTERS = {"y", "kept", "rounded", "p", "before", "dz"}
# The sizes of the tiles that tensor descriptors copy, by kernel and argument.
TILES = {
    ("forward_kernel", "x_tiles"): ("BLOCK_M", "BLOCK_K"),
    ("forward_kernel", "weight_tiles"): ("BLOCK_N", "BLOCK_K"),
    ("update_kernel", "x_tiles"): ("BLOCK_K", "BLOCK_IN"),
    ("update_kernel", "kept_tiles"): ("BLOCK_K", "BLOCK_OUT"),
}
INTEGER_POINTERS = {"where": "*u8", "listed": "*i32", "n_listed": "*i32", "is_positive": "*u8", "n_positive": "*i64"}
FLOATS = re.compile(
    r"eps|threshold_(pos|neg)|logit_scale|share_(pos|neg)|skip_below|strength|momentum|lr|sign|decay|shrink|keep2?"
    r"|take[12]?|(gradient|buffer)_share|correction[12]"
)
UNIT = re.compile(r"(.*_)?(col|stride)$|bias\.(.*_)?row$")
INTEGERS = re.compile(
    r"n_pos|total|columns|(in|out)_features|width|(input_)?splits|n_partials|n_row_losses|row_blocks|groups|units"
    r"|(.*_)?(row|col|stride)"
)


# What the update is not given, by how it comes by its coefficients, `launch.coefficient_form`, or by slopes instead.
FORMS = {
    "on the fly": ("made", "first", "second", "basis"),
    "given": ("made.listed", "made.n_listed", "first", "second", "basis", "terms"),
    "listed": ("made.row_losses", "first", "second", "basis", "terms"),
    "by group": ("made", "terms", "written", "basis"),
    "by unit": ("made", "terms", "written", "basis", "first.groups", "second.groups"),
    "by basis": ("made", "terms", "written", "first.groups", "second"),
}


# Learning rates and step counts as numbers.
ON_THE_HOST = {
    f"{name}.numbers.{pointer}": None for name in ("weight", "bias") for pointer in ("lr_pointer", "step_pointer")
}


def conv_shape(
    ins: int, outs: int, side: int, kernel: int = 3, stride: int = 1, pad: int = 1, groups: int = 1, pool: str = "none",
    size: int = 1, step: int = 1,
) -> records.Shape:  # fmt: skip
    """A convolution of square maps, with as many channels in a group."""
    before = (side + 2 * pad - kernel) // stride + 1
    behind = (before - size) // step + 1
    pairs = [(value, value) for value in (kernel, stride, pad, before, behind)]
    sizes = [value for pair in pairs for value in pair]
    return records.Shape(side, side, ins, outs, groups, *sizes, pool, size, size, step, step)


def pooled(shape: records.Shape, pool: str, size: int, step: int) -> records.Shape:
    """The same with a pool of square windows behind it."""
    behind = (shape.before_height - size) // step + 1
    return shape._replace(
        pooled_height=behind, pooled_width=behind, pool=pool, pool_height=size, pool_width=size, pool_stride_y=step,
        pool_stride_x=step,
    )  # fmt: skip


# Layers that shipped configurations are meant for, and the forms in which they are compiled: the usual one, and the one
# that has the most to load.
CONV_SHAPES = {"small": conv_shape(32, 32, 16), "large": conv_shape(128, 256, 16)}
CONV_FORMS: dict[str, dict[str, Any]] = {
    "maximum": {"pool": "max"}, "curved average": {"pool": "average", "ACTIVATION": "gelu", "images.scale": True},
}  # fmt: skip


class Report(NamedTuple):
    """What a kernel needs on a device: bytes of shared memory, and from its machine code registers of a thread,
    instructions, those of the matrix unit, and those that touch local memory within and outside of product loops."""

    shared: int
    registers: int
    instructions: int
    products: int
    local_in_loop: int
    local_elsewhere: int


class Case(NamedTuple):
    """A shipped configuration with a dtype and, for the update, one of `FORMS`."""

    target: str
    kernel: str
    kind: str
    size: str
    compute: str
    precision: str
    form: str

    def __str__(self) -> str:
        precision = f" {self.precision}" if self.compute == "float32" else ""
        return f"{self.target} {self.kernel} {self.kind} {self.size} {self.compute}{precision} {self.form}".rstrip()

    @property
    def config(self) -> Config:
        if self.kernel in configs.CONV_KERNELS:
            entries = configs.find(self.target)[self.kernel][self.kind]
            return entries[{"small": 0, "large": 1}[self.size]]["config"]
        by_slopes = self.form.startswith("by ")
        # Float32 activities beside rows of 16 bits are a mixed product.
        kind = "mixed" if by_slopes and self.kind == "half" else self.kind
        entries = configs.find(self.target)[self.kernel][kind]
        config = {**configs.DEFAULTS[self.kernel], **entries[{"small": 0, "large": 1}[self.size]]["config"]}
        return configs.beside_slopes(config) if by_slopes else config

    def compile(self) -> Any:
        if self.kernel in configs.CONV_KERNELS:
            of = CONV_FORMS[self.form]
            made = conv_forward if self.kernel == "conv_forward" else conv_update
            return made(self.target, self.config, self.compute, CONV_SHAPES[self.size], self.precision, **of)
        if self.kernel == "forward":
            return forward(self.target, self.config, self.compute, self.kind, self.precision)
        return update(self.target, self.config, self.compute, self.kind, self.precision, self.form)


def cases() -> Iterator[Case]:
    """Every shipped configuration in every dtype and form."""
    for target in TARGETS:
        for kernel in configs.KERNELS:
            for kind in configs.kinds_of(kernel):
                if kernel in configs.CONV_KERNELS and kind != "float32":
                    dtypes = [("bfloat16", "ieee")]
                elif kind != "float32":
                    dtypes = [("bfloat16", "ieee"), ("float16", "ieee")]
                elif target.startswith("gfx"):
                    dtypes = [("float32", "ieee")]
                else:
                    dtypes = [("float32", "ieee"), ("float32", "tf32")]
                for size in ("small", "large"):
                    for compute, precision in dtypes:
                        # Where a launch of its own makes the coefficients, the update has nothing but large tiles.
                        forms = [form for form in FORMS if form != "given" or size == "large"]
                        by_kernel = {"update": forms, **dict.fromkeys(configs.CONV_KERNELS, CONV_FORMS)}
                        for form in by_kernel.get(kernel, ("",)):
                            yield Case(target, kernel, kind, size, compute, precision, form)


def compiled(
    kernel: Any,
    target: str,
    config: Config,
    compute: str,
    raw: str,
    weight: str,
    integers: str | int = "i32",
    kept_as: str | None = None,
    **constants: Any,
) -> Any:
    """A kernel for a target; rows, weight and what the forward kept as `raw`, `weight` and `kept_as` dtypes.

    Arguments that `constants` lacks, or has as True, are given when it runs.

    Sizes and strides are multiples of 16 and rows lie one after another, as in nearly every call; `integers` makes
    them and the unit strides of another type, or the number 1, for which Triton compiles a kernel of its own.
    """
    constants = {name: value for name, value in constants.items() if value is not True or name.isupper()}
    signature, constexprs, attributes = {}, {}, {}

    def type_of(name: str, path: tuple[int, ...]) -> Any:
        """The type of an argument or of a record's member, `name` with a dot; fills in what goes with it."""
        member = name.rpartition(".")[2]
        record = NUMBERS.get(constants.get("RULE"), records.Adam) if member == "numbers" else RECORDS.get(name)
        if name.endswith(".numbers") and name in constants:
            record = None
        record = WRITTEN.get(kernel.__name__, records.Written) if name == "written" else record
        value = constants.get(name, config.get(name))
        if record is not None:
            if name in constants:  # a record without members
                constants.update(dict.fromkeys(f"{name}.{field}" for field in record._fields))
            fields = enumerate(record._fields)
            return record(*(type_of(f"{name}.{field}", (*path, place)) for place, field in fields))
        if name in constants or name in config or member == "numbers":
            constexprs[path] = value
            return "constexpr"
        if INTEGERS.fullmatch(member) and (integers == 1 or (integers == "i32" and UNIT.search(name))):
            constexprs[path] = 1
            return "constexpr"
        if name.endswith("_tiles"):
            if not config.get("TMA"):
                constexprs[path] = None
                return "constexpr"
            element = {"x_tiles": raw, "weight_tiles": weight, "kept_tiles": compute}[name]
            block = ", ".join(str(config[size]) for size in TILES[kernel.__name__, name])
            return f"tensordesc<{TYPES[element]}[{block}]>"
        if FLOATS.fullmatch(member):
            return "fp32"
        attributes[path] = [["tt.divisibility", 16]]
        if INTEGERS.fullmatch(member):
            return str(integers)
        if member in ROW_POINTERS:
            return f"*{TYPES[raw]}"
        if name == "activities.kept" and kept_as is not None:
            return f"*{TYPES[kept_as]}"
        if member in COMPUTE_POINTERS:
            return f"*{TYPES[compute]}"
        if member == "weight":
            return f"*{TYPES[weight]}"
        return INTEGER_POINTERS.get(member, "*fp32")

    for position, name in enumerate(kernel.arg_names):
        signature[name] = type_of(name, (position,))
    options = {key: value for key, value in config.items() if key.startswith("num_")}
    source = ASTSource(kernel, signature, constexprs, attributes)
    return triton.compile(source, target={**TARGETS, **UNTUNED}[target], options=options)


def forward(target: str, config: Config, compute: str, kind: str, precision: str = "ieee", **changes: Any) -> Any:
    """The forward of a layer with l2 norm, relu and a bias, on rows whose sums of squares are not known."""
    operands = compute if kind == "half" else "float32"
    constants = {
        "input_sumsq": None, "shared": None, "classes": None, "SQUARES": True, "SLOTS": 0,
        "rows.is_positive": None, "written.kept": None, "written.unit_sums": None,
        "NORM": "l2", "EPS_MODE": "add", "ACTIVATION": "relu", "SCALE_FIRST": False,
        "COMPUTE": LANGUAGE[compute], "PRECISION": precision, "WIDEN": False,
    }  # fmt: skip
    return compiled(launch.forward_kernel, target, config, compute, operands, operands, **{**constants, **changes})


def update(
    target: str, config: Config, compute: str, kind: str, precision: str = "ieee", form: str = "listed", **changes: Any
) -> Any:
    """The update with Adam and a bias, in one of `FORMS`."""
    constants = {
        "rows.is_positive": None, "terms.n_positive": None, "terms.sample_weight": None, "terms.threshold": None,
        **ON_THE_HOST, "weight.rounded": None, "bias.rounded": None, "peers": None, "parts": None,
        "RULE": "adam", "ACTIVATION": "relu", "GOODNESS": "mean",
        "LOSS": "logistic", "THRESHOLD_PER_ROW": False, "PARTIALS": 8, "SCALE_X": False,
        "COMPUTE": LANGUAGE[compute], "PRECISION": precision, "WIDEN": False,
    }  # fmt: skip
    constants |= dict.fromkeys(FORMS[form])
    raw = compute if kind == "half" else "float32"
    by_slopes = "written" in FORMS[form]
    if by_slopes:
        constants["PARTIALS"] = 0
    # A given loss reads the activities as they are.
    kept_as = "float32" if by_slopes else compute
    constants = {**constants, **changes}
    return compiled(launch.update_kernel, target, config, compute, raw, "float32", kept_as=kept_as, **constants)


def conv_forward(
    target: str, config: Config, compute: str, shape: records.Shape, precision: str = "ieee", **changes: Any
) -> Any:
    """A convolution's forward with relu, a bias and moments about a pivot."""
    shape, constants = _of_conv(shape, compute, precision, changes)
    config = _fitted("conv_forward", config, shape)
    constants |= {"kernels.pivot": True, "WINDOWS": conv.windows_in_tile(shape, config["BLOCK_M"])}
    without = _not_there("mapped", shape, constants)
    return compiled(conv.conv_forward_kernel, target, config, compute, compute, compute, **{**without, **constants})


def conv_update(
    target: str, config: Config, compute: str, shape: records.Shape, precision: str = "ieee", **changes: Any
) -> Any:
    """Its gradients of weight and bias, by slopes of both orders for each channel."""
    shape, constants = _of_conv(shape, compute, precision, changes)
    config = _fitted("conv_update", config, shape)
    of_parameters = [f"{name}.{field}" for name in ("weight", "bias") for field in ("numbers", "state1", "rounded")]
    without = {
        **dict.fromkeys(of_parameters), "peers": None, "parts.loss": None, "maps.dz": None,
        "first.groups": None, "second.groups": None,
    }  # fmt: skip
    without |= _not_there("maps", shape, constants)
    constants["WITHIN"] = conv.ends_with_image(shape, config["BLOCK_K"])
    return compiled(conv.conv_update_kernel, target, config, compute, compute, "float32", **{**without, **constants})


def of_maps(kernel: Any, target: str, compute: str, shape: records.Shape, **changes: Any) -> Any:
    """A pool of its own, or a gradient through it, with gelu and moments about a pivot."""
    shape, constants = _of_conv(shape, compute, "ieee", {"ACTIVATION": "gelu", **changes})
    absent = dict.fromkeys(("first.groups", "second.groups"))
    for name in ("mapped", "maps"):
        absent |= _not_there(name, shape, constants)
    config = {**conv.MAPS_BLOCK[False], "num_warps": 4}
    return compiled(kernel, target, config, compute, compute, compute, **{**absent, **constants})


def _of_conv(
    shape: records.Shape, compute: str, precision: str, changes: dict[str, Any]
) -> tuple[records.Shape, dict[str, Any]]:
    changes = dict(changes)
    pool = changes.pop("pool", "none")
    shape = shape if pool == "none" else pooled(shape, pool, 2, 2)
    constants = {
        "SHAPE": shape, "ACTIVATION": "relu", "images.scale": None,
        "COMPUTE": LANGUAGE[compute], "PRECISION": precision, "WIDEN": False,
    }  # fmt: skip
    return shape, {**constants, **changes}


def _fitted(kernel: str, config: Config, shape: records.Shape) -> Config:
    columns = shape.kernel_height * shape.kernel_width * shape.ins
    return configs.fitted(kernel, config, (0, columns, shape.outs), shape.ins)


def _not_there(name: str, shape: records.Shape, constants: dict[str, Any]) -> dict[str, Any]:
    """The maps that such a convolution does not keep."""
    keeps = constants["ACTIVATION"] in ("gelu", "silu") or shape.pool == "average"
    without = {f"{name}.before": keeps, f"{name}.where": shape.pool == "max"}
    return {field: None for field, is_there in without.items() if not is_there}


def machine_code(kernel: Any) -> str:
    """The machine code of a kernel compiled for an NVIDIA device."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(kernel.asm["cubin"])
        return subprocess.run([_tool("nvdisasm"), "-c", str(path)], capture_output=True, text=True, check=True).stdout


def report(kernel: Any, target: str) -> Report:
    """Reads a kernel's machine code. On AMD devices, scratch memory is counted as a whole, under `local_elsewhere`."""
    if target.startswith("gfx"):
        text = kernel.asm["amdgcn"]
        registers = int(_number(r"\.vgpr_count:\s+(\d+)", text)) + int(_number(r"\.agpr_count:\s+(\d+)", text))
        lines = [line.strip() for line in text.splitlines()]
        instructions = [line for line in lines if re.match(r"(v|s|ds|global|buffer|scratch|flat)_", line)]
        products = sum(line.startswith("v_mfma") for line in instructions)
        scratch = sum(line.startswith("scratch_") for line in instructions)
        return Report(kernel.metadata.shared, registers, len(instructions), products, 0, scratch)
    code = instructions_of(machine_code(kernel))
    loops = product_loops(code)
    local = [n for n, (_, text) in enumerate(code) if re.search(r"\b(LDL|STL)\b", text)]
    in_loop = sum(any(first <= n <= last for first, last in loops) for n in local)
    products = sum(bool(MATRIX_UNIT.search(text)) for _, text in code)
    return Report(kernel.metadata.shared, registers_of(kernel), len(code), products, in_loop, len(local) - in_loop)


MATRIX_UNIT = re.compile(r"\b(HGMMA|HMMA|UTCHMMA|UTCQMMA)\b")
PRODUCT = re.compile(rf"{MATRIX_UNIT.pattern}|\bFFMA2?\b")


def instructions_of(text: str) -> list[tuple[str | None, str]]:
    """(label before it or None, instruction) for each instruction of a disassembly."""
    found, label = [], None
    for line in text.splitlines():
        mark = re.match(r"\s*(\.L_x_\d+):", line)
        if mark:
            label = mark[1]
        elif re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+\S", line):
            found.append((label, line.split("*/", 1)[1]))
            label = None
    return found


def product_loops(code: list[tuple[str | None, str]]) -> list[tuple[int, int]]:
    """First and last instruction of each backward jump that encloses a matrix product."""
    places = {label: n for n, (label, _) in enumerate(code) if label is not None}
    loops = []
    for n, (_, text) in enumerate(code):
        jump = re.search(r"\bBRA\b.*?(\.L_x_\d+)", text)
        first = places.get(jump[1], n) if jump else n
        if first < n and any(PRODUCT.search(text) for _, text in code[first : n + 1]):
            loops.append((first, n))
    return loops


def registers_of(kernel: Any) -> int:
    """Registers of each thread."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(kernel.asm["cubin"])
        usage = subprocess.run(
            [_tool("cuobjdump"), "-res-usage", str(path)], capture_output=True, text=True, check=True
        )
    return int(_number(r"REG:(\d+)", usage.stdout))


def main(arguments: list[str]) -> None:
    table = {}
    print(f"{'':<52}{'  '.join(Report._fields)}")
    for case in cases():
        found = report(case.compile(), case.target)
        table[str(case)] = list(found)
        values = (f"{value:>{len(name)}}" for name, value in found._asdict().items())
        print(f"{case!s:<52}{'  '.join(values)}", flush=True)
    if "--write" in arguments:
        rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(values)}" for name, values in table.items())
        heads = f'"triton": "{triton.__version__}",\n "columns": {json.dumps(Report._fields)}'
        TABLE.write_text(f'{{\n {heads},\n "rows": {{\n{rows}\n }}\n}}\n')


def _number(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found[1] if found else "0"


def _tool(name: str) -> str:
    return os.path.join(os.path.dirname(triton.backends.nvidia.__file__), "bin", name)


if __name__ == "__main__":
    main(sys.argv[1:])
