"""What a partitioned program sends and multiplies, read from its HLO text.

Two things are counted that `Compiled.cost_analysis` leaves out: the bytes of collectives, and the work of loop
bodies as often as the loops run. The text wanted is that of the program *after partitioning and before the passes
of one backend* (`--xla_dump_hlo_pass_re=spmd-partition.*`): there every array still has the dtype that was asked
for, while the CPU's compiler later widens bfloat16, merges collectives and never forms a reduce-scatter. Three things
that the compilers of accelerators do are applied here, so that the counts are theirs:

* all-reduces that are added up are one, of the sum (the gradients of several projections of one input);
* an all-reduce of which every device keeps only its slice is a reduce-scatter;
* a collective on what a loop does not change runs once, before the loop.

Not here: how long anything takes (`fusejax.parallel.costs`), overlap, and the order of instructions.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import numpy as np

__all__ = ["Collective", "Program", "collectives", "dot_flops", "largest_array", "parse_program"]

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_BYTES |= {"s64": 8, "u64": 8, "f64": 8, "f8e4m3fn": 1, "f8e5m2": 1}
_ARRAY = re.compile(r"\b(pred|s8|u8|s16|u16|bf16|f16|s32|u32|f32|s64|u64|f64|f8e4m3fn|f8e5m2)\[([\d,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_DEVICE_IDS = r"(?:, device_ids=\((?:(\d[\d,]*)|(\[([\d,]+)\])(?:T\(([\d,]+)\))?)\))?"
_PASS_ON = ("transpose", "copy", "reshape", "bitcast", "convert", "optimization-barrier")


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str


@dataclass
class Program:
    """Computations by name, each a dict of instructions by name; `roots`: the name of each one's result."""

    entry: str
    computations: dict[str, dict[str, Instruction]]
    roots: dict[str, str]


class Collective(NamedTuple):
    """One collective instruction of a program."""

    kind: str
    dtypes: str
    bytes: int  # of the whole array: what a gather makes, what a reduction reads
    group: int  # devices that take part with each other
    groups: np.ndarray  # [groups, group] int, device ids
    count: int  # how often it runs in one call of the program
    source: str  # the operation of the model that it comes from, as jax names it

    @property
    def wire_bytes(self) -> float:
        """Bytes that each device sends in one run, by a ring."""
        if self.kind == "collective-permute":
            return float(self.bytes)
        passes = 2 if self.kind == "all-reduce" else 1
        return passes * self.bytes * (self.group - 1) / self.group


def parse_program(text: str) -> Program:
    """Returns the computations of an HLO module's text.

    Raises:
        ValueError: the text has no entry computation.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    roots: dict[str, str] = {}
    entry, current = "", ""
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = header[2]
            computations[current] = {}
            entry = current if header[1] else entry
        elif current and (start := _LINE.match(line)):
            instruction = _instruction(start[2], line[start.end() :])
            for operand in instruction.operands:
                _write_out_element(computations[current], operand)
            computations[current][instruction.name] = instruction
            if start[1]:
                roots[current] = instruction.name
    if not entry:
        raise ValueError("no ENTRY computation: this is no HLO text")
    return Program(entry, computations, roots)


def _instruction(name: str, rest: str) -> Instruction:
    cut = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:cut], rest[cut:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    inside, opcode = rest[opening + 1 : closing], rest[:opening]
    if opcode in ("constant", "parameter"):
        return Instruction(name, shape, opcode, (), inside + rest[closing + 1 :])
    marked = "%" if "%" in inside else r"(?:^|, *)(?:/\*index=\d+\*/)?"  # the short form leaves the mark out
    operands = re.findall(rf"{marked}([\w.\-]+(?:#\d+)*)", inside)
    return Instruction(name, shape, opcode, tuple(operands), rest[closing + 1 :])


def _write_out_element(inside: dict[str, Instruction], operand: str) -> None:
    """Adds the get-tuple-element that jax 0.12 writes as `%whole#2` in the place of an operand."""
    whole, mark, index = operand.rpartition("#")
    if not mark or operand in inside:
        return
    _write_out_element(inside, whole)
    elements, start, depth = [], 1, 0
    shape = inside[whole].shape if whole in inside else "()"
    for at, sign in enumerate(shape):
        depth += (sign in "([{") - (sign in ")]}")
        if (sign == "," and depth == 1) or (sign == ")" and depth == 0):
            elements.append(shape[start:at].strip())
            start = at + 1
    if int(index) >= len(elements):
        raise ValueError(f"{operand} is no element of {shape}")
    inside[operand] = Instruction(operand, elements[int(index)], "get-tuple-element", (whole,), f", index={index}")


def _closing(text: str, start: int) -> int:
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if depth == 0:
            return index
    raise ValueError(f"unbalanced brackets in {text[:80]!r}")


def _arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    return [(kind, tuple(int(n) for n in dims.split(",") if n)) for kind, dims in _ARRAY.findall(shape)]


def _size(shape: str) -> int:
    return sum(_BYTES[kind] * prod(dims) for kind, dims in _arrays(shape))


class _Run(NamedTuple):
    """A computation as often as it is reached."""

    name: str
    times: int
    outer: int = 1  # how often what its loop does not change runs
    fixed: frozenset[str] = frozenset()  # values that its loop does not change


def _calls(program: Program, run: _Run) -> Iterator[_Run]:
    """Yields a computation and all that it calls."""
    yield run
    name, times, outer, fixed = run
    for op in program.computations[name].values():
        if op.opcode == "while":
            body, condition = (re.search(rf"{key}=%?([\w.\-]+)", op.attributes) for key in ("body", "condition"))
            if body is None or condition is None:
                raise ValueError(f"the loop {op.name} names no body")
            turns = times * _trips(program, op, condition[1])
            yield from _calls(program, _Run(body[1], turns, times, _unchanged(program, body[1])))
        elif op.opcode == "call" and (called := re.search(r"to_apply=%?([\w.\-]+)", op.attributes)):
            given = _given(program, name, op, called[1], fixed)
            yield from _calls(program, _Run(called[1], times, outer, given))
        elif op.opcode in ("conditional", "fusion", "async-start"):
            names = re.findall(r"(?:to_apply|calls|\w+_computation)=%?([\w.\-]+)", op.attributes)
            if branches := re.search(r"branch_computations=\{([^}]*)\}", op.attributes):
                names += re.findall(r"%?([\w.\-]+)", branches[1])
            for inner in names:
                yield from _calls(program, _Run(inner, times, times))


def _given(program: Program, caller: str, call: Instruction, called: str, fixed: frozenset[str]) -> frozenset[str]:
    """The parameters of a called computation whose arguments the caller's loop does not change."""
    if not fixed:
        return frozenset()
    same = [_depends(operand, program.computations[caller], fixed) for operand in call.operands]
    parameters = [op for op in program.computations[called].values() if op.opcode == "parameter"]
    return frozenset(op.name for op in parameters if same[int(re.match(r"\d+", op.attributes)[0])])  # type: ignore[index]


def _trips(program: Program, loop: Instruction, condition: str) -> int:
    """How often a loop runs: as annotated, or the constant that its counter is compared with."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    inside = program.computations[condition]
    compare = inside[program.roots[condition]]
    limits = [inside[name] for name in compare.operands if inside[name].opcode == "constant"]
    if compare.opcode != "compare" or len(limits) != 1:
        raise ValueError(f"the loop {loop.name} has no constant number of turns")
    return int(limits[0].attributes.split(",")[0].split(")")[0])


def collectives(program: Program) -> list[Collective]:
    """Returns the collectives between two devices or more, those of accelerators' compilers (see above)."""
    found = []
    for name, times, outer, fixed in _calls(program, _Run(program.entry, 1)):
        inside = program.computations[name]
        users = _users(inside)
        summed = set()
        for op in inside.values():
            kind = op.opcode.removesuffix("-start")
            if kind not in KINDS:
                continue
            groups = _groups(op.attributes)
            if groups.shape[1] < 2:
                continue
            whole = op.shape if kind in ("all-gather", "all-reduce") else "".join(inside[x].shape for x in op.operands)
            if kind == "all-reduce":
                total = _sum(op, inside, users)
                if total in summed:
                    continue
                summed.add(total)
                kind = "reduce-scatter" if _sliced(total, inside, users) else kind
            count = outer if all(_depends(x, inside, fixed) for x in op.operands) and fixed else times
            dtypes = "+".join(sorted({dtype for dtype, _ in _arrays(whole)}))
            source = re.search(r'op_name="([^"]*)"', op.attributes)
            found.append(
                Collective(kind, dtypes, _size(whole), groups.shape[1], groups, count, source[1] if source else "")
            )
    return found


def dot_flops(program: Program) -> int:
    """Returns the operations of all matrix products on one device, a multiply-add counting two."""
    total = 0
    for name, times, _, _ in _calls(program, _Run(program.entry, 1)):
        inside = program.computations[name]
        for op in inside.values():
            if op.opcode != "dot":
                continue
            (_, left), *_ = _arrays(inside[op.operands[0]].shape)
            (_, out), *_ = _arrays(op.shape)
            dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.attributes)
            contracted = prod(left[int(n)] for n in dims[1].split(",") if n) if dims else 1
            total += 2 * prod(out) * contracted * times
    return total


def largest_array(program: Program) -> tuple[int, str]:
    """Returns the bytes of the largest array that an instruction makes, and its shape."""
    shapes = (
        (_BYTES[kind] * prod(dims), f"{kind}[{','.join(map(str, dims))}]")
        for inside in program.computations.values()
        for op in inside.values()
        if op.opcode not in ("parameter", "tuple", "get-tuple-element", "while", "call")
        for kind, dims in _arrays(op.shape)
    )
    return max(shapes, default=(0, ""))


def _users(inside: dict[str, Instruction]) -> dict[str, list[Instruction]]:
    users: dict[str, list[Instruction]] = {}
    for op in inside.values():
        for operand in op.operands:
            users.setdefault(operand, []).append(op)
    return users


def _sliced(name: str, inside: dict[str, Instruction], users: dict[str, list[Instruction]]) -> bool:
    """Whether a value goes into nothing but slices at places that depend on the device."""
    after = users.get(name, [])
    return bool(after) and all(
        op.opcode == "dynamic-slice" or (op.opcode in _PASS_ON and _sliced(op.name, inside, users)) for op in after
    )


def _sum(op: Instruction, inside: dict[str, Instruction], users: dict[str, list[Instruction]]) -> str:
    """The name of the sum of all-reduces that an all-reduce is a term of; its own where it is none."""
    name, groups = op.name, _groups(op.attributes).tolist()
    while len(after := users.get(name, [])) == 1 and after[0].opcode == "add":
        if not all(_reduced(operand, groups, inside, users) for operand in after[0].operands):
            break
        name = after[0].name
    return name


def _reduced(name: str, groups: list, inside: dict[str, Instruction], users: dict[str, list[Instruction]]) -> bool:
    """Whether a value is an all-reduce over `groups`, or a sum of such, that nothing else reads."""
    op = inside[name]
    if len(users[name]) != 1:
        return False
    if op.opcode == "add":
        return all(_reduced(operand, groups, inside, users) for operand in op.operands)
    return op.opcode == "all-reduce" and _groups(op.attributes).tolist() == groups


def _unchanged(program: Program, body: str) -> frozenset[str]:
    """The names, in a loop's body, of what every turn hands on as it is."""
    inside = program.computations[body]
    root = inside[program.roots[body]]
    if root.opcode != "tuple":
        return frozenset()
    fixed = set()
    for index, name in enumerate(root.operands):
        op = inside[name]
        if op.opcode == "get-tuple-element" and re.search(rf"index={index}\b", op.attributes):
            fixed.add(index)
    return frozenset(
        op.name
        for op in inside.values()
        if op.opcode == "get-tuple-element"
        and inside[op.operands[0]].opcode == "parameter"
        and int(re.search(r"index=(\d+)", op.attributes)[1]) in fixed  # type: ignore[index]
    )


def _depends(name: str, inside: dict[str, Instruction], fixed: frozenset[str]) -> bool:
    """Whether a value is made of unchanged values and constants only, by operations of one operand or slices."""
    if name in fixed:
        return True
    op = inside[name]
    if op.opcode in ("parameter", "get-tuple-element", *KINDS) or not op.operands:
        return op.opcode in ("constant", "partition-id", "iota")
    return all(_depends(x, inside, fixed) for x in op.operands)


def _groups(attributes: str) -> np.ndarray:
    """Returns the device groups [groups, size] of a collective, in whichever of XLA's three notations."""
    if mesh := re.search(rf"replica_groups=mesh\[([^\]]*)\]{_DEVICE_IDS} ?\{{([^}}]*)\}}", attributes):
        names = re.findall(r"'([^']+)'=(\d+)", mesh[1])
        sizes, axes = [int(size) for _, size in names], [name for name, _ in names]
        if ":" in mesh[6]:
            raise ValueError(f"groups over parts of axes are not read: {mesh[0]}")
        chosen = [axes.index(axis) for axis in re.findall(r"'([^']+)'", mesh[6])]
        ids = np.array(mesh[2].split(","), int) if mesh[2] else _iota(mesh[4] or str(prod(sizes)), mesh[5])
        return _over(ids.reshape(sizes), chosen)
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        return _iota(iota[3], iota[4]).reshape(int(iota[1]), int(iota[2]))
    if listed := re.search(r"replica_groups=\{(\{[\d,{} ]*\})\}", attributes):
        return np.array([[int(n) for n in row.split(",")] for row in re.findall(r"\{([\d, ]+)\}", listed[1])])
    if pairs := re.search(r"source_target_pairs=\{(\{[\d,{} ]*\})\}", attributes):
        return np.array([[int(n) for n in row.split(",")] for row in re.findall(r"\{([\d, ]+)\}", pairs[1])])
    if "replica_groups={}" in attributes:
        return np.zeros((1, 1), int)  # all replicas of a program with one partition
    raise ValueError(f"device groups in a notation that is not read: {attributes[:200]}")


def _iota(sizes: str, order: str | None) -> np.ndarray:
    """Returns 0, 1, 2, ... in these sizes, its axes in another order."""
    shape = [int(n) for n in sizes.split(",")]
    ids = np.arange(prod(shape)).reshape(shape)
    return ids.transpose([int(n) for n in order.split(",")]) if order else ids


def _over(ids: np.ndarray, axes: Sequence[int]) -> np.ndarray:
    size = prod(ids.shape[axis] for axis in axes)
    rest = [axis for axis in range(ids.ndim) if axis not in axes]
    return ids.transpose([*rest, *axes]).reshape(-1, size)
