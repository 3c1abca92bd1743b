"""Where Hopper's matrix products find their operands, read from the machine code that `nvdisasm -c` prints."""

from __future__ import annotations

import re
from typing import NamedTuple

WINDOW = "0x400"  # where a program's shared memory begins


class Instruction(NamedTuple):
    predicated: bool
    name: str
    operands: list[str]


def astray(code: str) -> list[str]:
    """The products that may find an operand by a descriptor which no address in shared memory went into.

    On every way to a product the uniform registers of its descriptors must come from shared memory's first address. (A must-analysis over
    the graph of jumps; what comes from the registers of threads is taken for right.)
    """
    program, labels = parsed(code)
    found: list[str] = []
    good: dict[int, frozenset[str]] = {
        0: frozenset()
    }  # before each instruction, the registers that hold such an address
    left = [0]
    while left:
        n = left.pop()
        after = step(program[n], good[n])
        for to in successors(program, labels, n):
            known = after if to not in good else after & good[to]
            if known != good.get(to):
                good[to] = known
                left.append(to)
    for n, registers in sorted(good.items()):
        if not descriptors(program[n]) <= registers:
            found.append(f"{program[n].name} {', '.join(program[n].operands)}")
    return found


def parsed(code: str) -> tuple[list[Instruction], dict[str, int]]:
    program: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(program)
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(@!?U?P\w+\s+)?([A-Z]\S*)\s*(.*?)\s*;", line):
            operands = [x.strip().replace(".reuse", "") for x in found[3].split(",")] if found[3] else []
            program.append(Instruction(found[1] is not None, found[2], operands))
    return program, labels


def successors(program: list[Instruction], labels: dict[str, int], n: int) -> list[int]:
    instruction, following = program[n], [n + 1] if n + 1 < len(program) else []
    if instruction.name.startswith("BRA"):
        target = [labels[x] for x in re.findall(r"\.L_x_\d+", " ".join(instruction.operands))]
        return target + (following if instruction.predicated or len(instruction.operands) > 1 else [])
    return [] if instruction.name == "EXIT" and not instruction.predicated else following


def descriptors(instruction: Instruction) -> set[str]:
    """The first register of each; that of the left operand is not read where this comes from threads' registers."""
    if not instruction.name.startswith("HGMMA"):
        return set()
    first = next(int(x) for x in re.findall(r"gdesc\[UR(\d+)\]", " ".join(instruction.operands)))
    both = {f"UR{first}", f"UR{first + 2}"}
    return {f"UR{first + 2}"} if re.fullmatch(r"R\d+", instruction.operands[1]) else both


def step(instruction: Instruction, registers: frozenset[str]) -> frozenset[str]:
    name, operands = instruction.name, instruction.operands
    if not operands or not re.fullmatch(r"UR\d+", operands[0]) or name.startswith("HGMMA"):
        return registers
    read = {x.lstrip("-") for x in operands[1:]}
    right = bool(read & registers) or name == "R2UR" or (name == "UMOV" and operands[1] == WINDOW)
    first = int(operands[0][2:])
    written = {f"UR{first}", f"UR{first + 1}"} if name.endswith(".64") or ".WIDE" in name else {f"UR{first}"}
    return registers | written if right else registers - written
