"""Count the cost of a program that XLA compiled for TPU, from its text.

Unlike `Compiled.cost_analysis`, this counts a loop's body once per iteration.
"""

import collections
import dataclasses
import math
import re
import statistics
from collections.abc import Callable, Sequence

from rho1_jax.training.accounting import seen_keys

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "f32": 4, "f64": 8}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Number of matrix products in each splash attention kernel, by a part of the kernel's name.
SPLASH_PRODUCTS = {"_fwd_": 2, "_dq_": 3, "_dkv_": 4}
# These take no time themselves: they only name a value, or their cost is counted in what they call.
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional")
_ARRAY = re.compile(r"\b(pred|[subf]+\d+)\[([\d,]*)\](\{[^}]*\})?")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%(\S+) = (.*?) ([a-z][\w\-]*)\((.*)$")


@dataclasses.dataclass
class Instruction:
    """One instruction of a computation. `shape` and `rest` are raw text; `operands` are instruction names."""

    name: str
    shape: str
    opcode: str
    operands: list[str]
    rest: str
    is_root: bool

    def arrays(self) -> list[tuple[str, tuple[int, ...], bool]]:
        """Each array of the result: its dtype, its sizes, and whether it is in the chip's main memory."""
        return [
            (dtype, tuple(int(size) for size in sizes.split(",") if size), "S(1)" not in (layout or ""))
            for dtype, sizes, layout in _ARRAY.findall(self.shape)
        ]

    @property
    def op_name(self) -> str:
        """The JAX operation and name scopes that the instruction comes from. Empty if the text does not say."""
        match = re.search(r'op_name="([^"]*)"', self.rest)
        return match[1] if match else ""

    def attribute(self, name: str) -> str:
        """The computation that an attribute refers to, as in `condition=%computation`."""
        return _groups(rf"\b{name}=%([^,\s)]+)", self.rest)[0]

    def called(self) -> list[str]:
        """The computations that this instruction runs."""
        return re.findall(r"(?:calls|body|condition|true_computation|false_computation)=%([^,\s)]+)", self.rest)


@dataclasses.dataclass
class Cost:
    """Cost per chip.

    Attributes:
      flops: of matrix products and attention kernels.
      memory_bytes: estimated bytes read from and written to main memory.
      collectives: [count, bytes received] of each kind.
      selection_flops: elementwise operations under the name scope "selection". Not part of `flops`.
      selection_bytes: bytes that collectives under the name scope "selection" receive. Part of `collectives`.
    """

    flops: float = 0
    memory_bytes: float = 0
    collectives: dict[str, list[float]] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(lambda: [0.0, 0.0])
    )
    selection_flops: float = 0
    selection_bytes: float = 0

    def add(self, other: "Cost", times: float) -> None:
        """Add another cost `times` times."""
        self.flops += times * other.flops
        self.memory_bytes += times * other.memory_bytes
        self.selection_flops += times * other.selection_flops
        self.selection_bytes += times * other.selection_bytes
        for kind, (count, size) in other.collectives.items():
            self.collectives[kind][0] += times * count
            self.collectives[kind][1] += times * size

    @property
    def collective_bytes(self) -> float:
        """Bytes received by all collectives."""
        return sum(size for _, size in self.collectives.values())


class Program:
    """A compiled TPU program, parsed from its text."""

    def __init__(self, text: str, dynamic_trips: Callable[[str], float], sliding_windows: Sequence[int | None]):
        """Parse a program.

        Args:
          text: the optimized program, from `jax.stages.Compiled.as_text()`.
          dynamic_trips: maps a loop's op_name to its number of iterations, for loops whose count is not in the text.
          sliding_windows: the window of each layer's attention, in tokens; None for full causal attention. Every
            attention kernel counts as the mean over the layers, because the text does not say which layers use it.
        """
        self._dynamic_trips, self._windows = dynamic_trips, sliding_windows
        self._computations: dict[str, dict[str, Instruction]] = {}
        self._costs: dict[tuple[str, bool], Cost] = {}
        self._channels: dict[str, Instruction] = {}
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            header = re.match(r"^(ENTRY )?%(\S+) \(.*\{$", line)
            if header:
                current = self._computations[header[2]] = {}
                if header[1]:
                    self._entry = header[2]
                continue
            instruction = _INSTRUCTION.match(line)
            if instruction:
                name, shape, opcode, rest = instruction.groups()
                operands = re.findall(r"%([^,\s)]+)", rest.split("), ")[0])
                current[name] = Instruction(name, shape, opcode, operands, rest, "ROOT" in line[:10])

    def cost(self) -> Cost:
        """The cost of the whole program."""
        return self._cost(self._entry, True)

    def _cost(self, computation: str, in_memory: bool) -> Cost:
        key = computation, in_memory
        if key not in self._costs:
            self._costs[key] = Cost()
            for instruction in self._computations[computation].values():
                self._costs[key].add(self._own_cost(instruction, self._computations[computation], in_memory), 1)
                times = self._trips(instruction) if instruction.opcode == "while" else 1
                inside = in_memory and instruction.opcode != "fusion"
                for called in instruction.called():
                    self._costs[key].add(self._cost(called, inside), times)
        return self._costs[key]

    def _trips(self, loop: Instruction) -> float:
        """Iterations of a loop. Its condition compares a counter, which starts at zero, with a constant limit."""
        condition, body = (self._computations[loop.attribute(name)] for name in ("condition", "body"))
        counter, limit = (condition[operand] for operand in _root(condition).operands)
        if limit.opcode != "constant":
            return self._dynamic_trips(loop.op_name)
        step = 0
        value = body[_root(body).operands[int(_groups(r"index=(\d+)", counter.rest)[0])]]
        while value.opcode in ("add", "copy"):
            constants = [body[operand] for operand in value.operands if body[operand].opcode == "constant"]
            step += sum(_constant(constant) for constant in constants)
            value = body[next(operand for operand in value.operands if body[operand].opcode != "constant")]
        return math.ceil(_constant(limit) / (step or 1))

    def _is_first(self, collective: Instruction) -> bool:
        """True for the first instruction of a collective: an asynchronous one has several, with the same channel."""
        channel = re.search(r"channel_id=(\d+)", collective.rest)
        return channel is None or self._channels.setdefault(channel[1], collective) is collective

    def _own_cost(self, instruction: Instruction, around: dict[str, Instruction], in_memory: bool) -> Cost:
        cost = Cost()
        kind = instruction.opcode.removesuffix("-start")
        if instruction.opcode == "convolution":
            cost.flops = _convolution_flops(instruction, around)
        elif instruction.opcode == "custom-call" and instruction.name.startswith("splash"):
            cost.flops = self._splash_flops(instruction, around)
        elif kind in COLLECTIVES and self._is_first(instruction):
            received = _received_bytes(instruction, kind)
            cost.collectives[kind][0] += 1
            cost.collectives[kind][1] += received
        if in_memory and instruction.opcode not in _FREE and not instruction.opcode.endswith("-start"):
            cost.memory_bytes = 2 * self._written_bytes(instruction)  # assumes that each result is read once
        if "selection" in instruction.op_name:
            cost.selection_bytes = sum(size for _, size in cost.collectives.values())
            if not in_memory and instruction.opcode not in _FREE:
                cost.selection_flops = sum(math.prod(sizes) for _, sizes, _ in instruction.arrays())
        return cost

    def _written_bytes(self, instruction: Instruction) -> float:
        """Bytes of the result that go to main memory. An update of a slice writes only the slice."""
        if instruction.opcode == "fusion":
            body = self._computations[instruction.called()[0]]
            root = _root(body)
            if root.opcode == "dynamic-update-slice":
                return _array_bytes(body[root.operands[1]].arrays())
        return _array_bytes([array for array in instruction.arrays() if array[2]])

    def _splash_flops(self, kernel: Instruction, around: dict[str, Instruction]) -> float:
        # The largest operand is [rows, heads, L, C]. The rows axis is missing for a single row.
        operands = (sizes for operand in kernel.operands for _, sizes, _ in around[operand].arrays())
        queries = max(operands, key=math.prod)
        products = next(count for part, count in SPLASH_PRODUCTS.items() if part in kernel.name)
        keys = statistics.fmean(seen_keys(queries[-2], window) for window in self._windows)
        return 2 * products * math.prod(queries) * keys


def _root(computation: dict[str, Instruction]) -> Instruction:
    return next(instruction for instruction in computation.values() if instruction.is_root)


def _constant(instruction: Instruction) -> int:
    return int(_groups(r"^(-?\d+)", instruction.rest)[0])


def _groups(pattern: str, text: str) -> tuple[str, ...]:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"cannot parse the compiled program: no match for {pattern!r} in {text[:300]!r}")
    return match.groups()


def _array_bytes(arrays: list[tuple[str, tuple[int, ...], bool]]) -> float:
    return sum(BYTES[dtype] * math.prod(sizes) for dtype, sizes, _ in arrays)


def _received_bytes(instruction: Instruction, kind: str) -> float:
    """Bytes that each chip of the group receives, with the algorithm that transfers the least."""
    arrays = instruction.arrays()
    if instruction.opcode.endswith("-start") and kind in ("all-gather", "collective-permute"):
        arrays = (
            arrays[len(arrays) // 2 :] if kind == "all-gather" else arrays[1:2]
        )  # skip the operand, which is listed first
    size = _array_bytes(arrays)
    if kind == "collective-permute":
        return size
    chips = _group_size(instruction.rest)
    factor = {"all-reduce": 2 * (chips - 1) / chips, "reduce-scatter": chips - 1}.get(kind, (chips - 1) / chips)
    return factor * size


def _group_size(text: str) -> int:
    """Chips per group, from replica_groups=[4,16]<=[64], {{0,1},{2,3}} or mesh['x'=4,'y'=16] {'y'}."""
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(match[1])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return len(match[1].split(","))
    mesh, axes = _groups(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text)
    sizes = dict(axis.split("=") for axis in mesh.split(","))
    return math.prod(int(sizes[axis.strip()]) for axis in axes.split(","))


def _convolution_flops(instruction: Instruction, around: dict[str, Instruction]) -> float:
    """Two operations for each product of an input and a weight. Products with padding do not count."""
    lhs, rhs, out = _groups(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
    lhs_sizes, rhs_sizes = (around[operand].arrays()[0][1] for operand in instruction.operands[:2])
    out_sizes = instruction.arrays()[0][1]
    window = re.search(r"window=\{([^}]*)\}", instruction.rest)
    fields = dict(field.split("=") for field in window[1].split()) if window else {}

    def per_axis(name: str, default: str, axis: int) -> str:
        return fields[name].split("x")[axis] if name in fields else default

    products = 1
    spatial = sorted(label for label in out if label.isdigit())
    for axis, label in enumerate(spatial):
        size, length, steps = lhs_sizes[lhs.index(label)], rhs_sizes[rhs.index(label)], out_sizes[out.index(label)]
        low = int(per_axis("pad", "0_0", axis).split("_")[0])
        stride, spread = int(per_axis("stride", "1", axis)), int(per_axis("rhs_dilate", "1", axis))
        holes = int(per_axis("lhs_dilate", "1", axis))
        products *= sum(
            0 <= (at := step * stride + tap * spread - low) <= (size - 1) * holes and at % holes == 0
            for step in range(steps)
            for tap in range(length)
        )
    return 2 * out_sizes[out.index("b")] * out_sizes[out.index("f")] * rhs_sizes[rhs.index("i")] * products
