"""Plants faults in PTX text: the proof that running it would show them.

A fault changes one instruction that a case executes: operands exchanged, a wait or a barrier removed, another shape of
a matrix or a copy, a bit of sparse metadata, an address or a number off by one element, a comparison or a guard turned.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

WAITS = re.compile(
    r"(?:bar\.sync|bar\.warp\.sync|cp\.async\.(?:wait|commit)_group|fence\.|mbarrier\.arrive)[^;]*;"
    r"|wait: mbarrier\.try_wait[^}]*done:"
)
TURNED = {"lt": "ge", "ge": "lt", "le": "gt", "gt": "le", "eq": "ne", "ne": "eq"}


@dataclass(frozen=True)
class Planted:
    line: int  # in the file, from 1
    kind: str
    before: str
    after: str

    def apply(self, lines: Sequence[str]) -> str:
        return "\n".join([*lines[: self.line - 1], self.after, *lines[self.line :]])

    def plain(self) -> str:
        """Kind and change, without the line and the registers' numbers: the same from one nvcc to the next."""
        before, after = (re.sub(r"%[a-z]+\d+", "%", " ".join(text.split())) for text in (self.before, self.after))
        return f"{self.kind}: {before} -> {after}"

    def __str__(self) -> str:
        return f"line {self.line}: {self.kind}: {self.before.strip()} -> {self.after.strip()}"


def _exchanged(text: str, pattern: str, first: int, second: int) -> str | None:
    """Two groups of a match exchanged, None where they are the same."""
    found = re.search(pattern, text)
    if not found or found[first] == found[second]:
        return None
    low, high = sorted((first, second), key=found.start)
    return (
        text[: found.start(low)] + found[high] + text[found.end(low) : found.start(high)] + found[low]
        + text[found.end(high) :]
    )  # fmt: skip


def faults_of(line: int, text: str) -> Iterator[Planted]:
    """All faults that can be planted in one line."""

    def planted(kind: str, after: str | None) -> Iterator[Planted]:
        if after is not None and after != text:
            yield Planted(line, kind, text, after)

    if WAITS.search(text):
        yield from planted("removed", WAITS.sub("", text, count=1))
    three = r"(%\w+), (-?[%\w]+), (-?[%\w]+);"
    if re.search(r"\b(sub|shl|shr|div|rem)\.", text):
        yield from planted("exchanged", _exchanged(text, three, 2, 3))
    if re.search(r"\b(selp)\.", text):
        yield from planted("exchanged", _exchanged(text, r"%\w+, (-?[%\w]+), (-?[%\w]+), %p", 1, 2))
    if re.search(r"\b(mad|fma)\.", text):
        yield from planted("exchanged", _exchanged(text, r"%\w+, [%\w]+, ([%\w]+), ([%\w]+);", 1, 2))
    if re.search(r"\b(mma|ldmatrix)\b", text):
        yield from planted("exchanged", _exchanged(text, r"\{(%\w+),(%\w+)", 1, 2))
    if "mma" in text:  # of the factors
        yield from planted("exchanged", _exchanged(text, r"\}, \{(%\w+),(%\w+)", 1, 2))
    if "mma.sp" in text:
        kept = re.search(r"(%\w+), 0x0;", text)
        yield from planted("metadata", f"xor.b32 {kept[1]}, {kept[1]}, 5; {text.strip()}")
        yield from planted("metadata", f"xor.b32 {kept[1]}, {kept[1]}, 0x300000; {text.strip()}")
    if "ldmatrix" in text:
        turned = text.replace(".trans", "") if ".trans" in text else re.sub(r"(\.x[24])", r"\1.trans", text)
        yield from planted("shape", turned)
    if "cp.async" in text and re.search(r", (4|8|16), %", text):
        size = re.search(r", (4|8|16), (%\w+)", text)
        yield from planted("shape", text.replace(size[0], f", {size[1]}, 0"))
    if re.search(r"\b(ld|st)\.(global|shared)", text):
        step = 16 if "v4" in text else 8 if "v2" in text or "64 " in text else 2 if "16 " in text else 4
        if address := re.search(r"\[(%?\w+)(?:\+(-?\d+))?\]", text):  # a register's, or a name's
            yield from planted("address", text.replace(address[0], f"[{address[1]}+{int(address[2] or 0) + step}]"))
        if ".nc" not in text and "@" in text:
            yield from planted("guard", text.replace("@%", "@!%"))
    elif text.strip().startswith("@"):
        turned = text.replace("@!%", "@%") if "@!%" in text else text.replace("@%", "@!%")
        yield from planted("guard", turned)
    compared = re.search(r"\bsetp\.(lt|ge|le|gt|eq|ne)\.[su]", text)
    if compared:
        yield from planted("comparison", text.replace(f"setp.{compared[1]}.", f"setp.{TURNED[compared[1]]}."))
    number = re.search(r"\b(?:add|mul|mad|shl|shr|and)\.[\w.]+\s+%\w+, %\w+, (\d+)[,;]", text)
    if number:
        changed = text[: number.start(1)] + str(int(number[1]) + 1) + text[number.end(1) :]
        yield from planted("number", changed)


def sample(text: str, executed: Sequence[int], count: int, seed: int) -> list[Planted]:
    """Some of the faults in the executed lines: every kind in turn, as long as it has any."""
    lines = text.split("\n")
    kinds: dict[str, list[Planted]] = {}
    for line in executed:
        for fault in faults_of(line, lines[line - 1]):
            kinds.setdefault(fault.kind, []).append(fault)
    chance = random.Random(seed)
    for faults in kinds.values():
        chance.shuffle(faults)
    chosen: list[Planted] = []
    while kinds and len(chosen) < count:
        for kind in sorted(kinds):
            chosen.append(kinds[kind].pop())
            if not kinds[kind]:
                del kinds[kind]
    return chosen[:count]
