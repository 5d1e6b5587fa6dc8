"""Plants faults in copies of the kernels: the proof that the emulated tests would see such faults.

Every fault is a run-time switch, so that one compilation holds all faults of a file: `__syncthreads();` becomes
`{ if (!mutant(7)) __syncthreads(); }`, `i < n` becomes `i < (n) - mutant(8)`, `a[i]` becomes `a[(i) + mutant(9)]`. The
runner switches on the one whose number stands in EMULATOR_MUTANT. Only the bodies of __device__ and __global__
functions are touched.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

# Statements that order or publish something: dropped one by one.
SYNCHRONISING = "|".join(
    (r"__syncthreads", r"__syncwarp", r"cp_async_(?:commit|wait)", r"mbar_\w+", r"fence_\w+", r"tma_\w+", r"wgmma_\w+")
)


@dataclass(frozen=True)
class Mutant:
    file: Path
    line: int
    kind: str  # "drop", "bound", "index", "forget", "shuffle"
    what: str  # the source text that it changes
    begin: int
    end: int
    before: str  # inserted at begin and at end; {} stands for the switch
    after: str
    ordinal: int = 1  # among the faults of this file, kind and text

    @property
    def key(self) -> str:
        """What survivors.txt calls it: without line numbers, which change too easily."""
        return f"{self.file.name}: {self.kind} {self.ordinal}: {self.what}"

    def __str__(self) -> str:
        return f"{self.file.name}:{self.line}: {self.kind}: {self.what}"


def blank_comments(text: str) -> str:
    """Comments and string literals as spaces, everything else where it was."""

    def blank(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", match.group())

    return re.sub(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', blank, text, flags=re.DOTALL)


def _matching(text: str, at: int, opening: str, closing: str) -> int:
    """The position of the bracket that closes the one at `at`."""
    depth = 0
    for i in range(at, len(text)):
        depth += (text[i] == opening) - (text[i] == closing)
        if depth == 0:
            return i
    raise ValueError("unbalanced brackets")


def device_bodies(text: str) -> Iterator[tuple[int, int]]:
    """Where the bodies of __device__ and __global__ functions begin and end, in comment-free text."""
    end_of_last = 0
    for match in re.finditer(r"__(?:device|global)__", text):
        if match.start() < end_of_last:
            continue
        i, seen_parameters = match.end(), False
        while i < len(text) and text[i] not in ";{":
            if text[i] == "(":
                seen_parameters = True
                i = _matching(text, i, "(", ")")
            i += 1
        if i < len(text) and text[i] == "{" and seen_parameters:
            end_of_last = _matching(text, i, "{", "}")
            yield i + 1, end_of_last


def _operand_end(text: str, at: int) -> int:
    """The end of the right operand of a comparison that begins at `at`."""
    depth = 0
    i = at
    while i < len(text):
        c = text[i]
        if c in "([{":
            depth += 1
        elif c in ")]}":
            if depth == 0:
                break
            depth -= 1
        elif depth == 0 and (
            (c in ";?,:" and text[i : i + 2] != "::" and text[i - 1] != ":") or text[i : i + 2] in ("&&", "||")
        ):
            break
        i += 1
    while text[i - 1].isspace():
        i -= 1
    return i


def _statement_start(text: str, at: int) -> bool:
    return re.search(r"(?:[;{})]|\belse)\s*$", text[:at]) is not None or text[:at].rstrip().endswith("unroll")


def find(path: Path, source: str) -> list[Mutant]:
    """All faults that can be planted in a file, in the order of their places."""
    text = blank_comments(source)
    # Preprocessor lines and what is evaluated at compile time stay as they are.
    masked = re.sub(r"^[ \t]*#[^\n]*", lambda m: ";" + " " * (len(m.group()) - 1), text, flags=re.MULTILINE)
    constant = [m.span() for m in re.finditer(r"(?:\bconstexpr\b|static_assert|\busing\b)[^;{]*(?:;|\{)", masked)]
    found: list[Mutant] = []

    def add(kind: str, begin: int, end: int, before: str, after: str, shown: tuple[int, int] | None = None) -> None:
        if any(a <= begin < b for a, b in constant):
            return
        a, b = shown or (begin, end)
        what = re.sub(r"\s+", " ", source[a:b]).strip()
        found.append(Mutant(path, source.count("\n", 0, begin) + 1, kind, what, begin, end, before, after))

    for begin, end in device_bodies(masked):
        body = slice(begin, end)
        for m in re.finditer(rf"\b(?:{SYNCHRONISING})\b(?:<[^<>;]*>)?\([^;]*\);", masked[body]):
            if _statement_start(masked, begin + m.start()):
                add("drop", begin + m.start(), begin + m.end(), "{{ if (!{}) ", " }}")
        for m in re.finditer(r" (?:<|>=|<=|>) (?=\S)", masked[body]):
            a = begin + m.end()
            b = _operand_end(masked, a)
            line = masked.rfind("\n", 0, a) + 1
            add("bound", a, b, "(", ") - {}", (max(line, masked.rfind("(", 0, a) + 1), b))
        for m in re.finditer(r"(?<=\w)\[|(?<=\])\[", masked[body]):
            a = begin + m.end()
            b = _matching(masked, a - 1, "[", "]")
            name = re.search(r"[\w.>\-]+(?:\[[^\[\]]*\])*$", masked[: a - 1])
            declares = name and re.search(r"\b(?!return|else|case)\w+[>&*]?\s+$", masked[: name.start()])
            if a < b and name and not declares:
                add("index", a, b, "(", ") + {}", (name.start(), b + 1))
        for m in re.finditer(r"(?:\*?\w[\w.]*(?:\[[^;=]*?\])* [-+*]?= |store_vec<|load_vec<)[^;{}]*;", masked[body]):
            a = begin + m.start()
            if _statement_start(masked, a) and not m.group().startswith("else"):
                add("forget", a, begin + m.end(), "{{ if (!{}) ", " }}")
        for m in re.finditer(r"__shfl_\w+\(", masked[body]):
            a = begin + m.end()
            close = _matching(masked, a - 1, "(", ")")
            first = _operand_end(masked, a)
            add("shuffle", a, first, "(", ") ^ {}", (begin + m.start(), close + 1))
            last = masked.rfind(",", a, close) + 1
            add("shuffle", last, close, "(", ") ^ {}", (begin + m.start(), close + 1))
    found.sort(key=lambda f: (f.begin, -f.end))
    seen: Counter[tuple[str, str]] = Counter()
    for i, fault in enumerate(found):
        seen[fault.kind, fault.what] += 1
        found[i] = replace(fault, ordinal=seen[fault.kind, fault.what])
    return found


def limit_dtypes(source: str) -> str:
    """Without float64 and bfloat16, which differ in types only: a copy then compiles in half the time."""
    return re.sub(r"^[^\n]*TypeTag<(?:double|__nv_bfloat16)>\{\}[^\n]*$", "", source, flags=re.MULTILINE)


def plant(source: str, mutants: list[Mutant], numbers: list[int]) -> str:
    """The source with all given mutants in it, each behind its switch."""
    edits = []  # (position, closers first, then openers; outer openers first, inner closers first, text)
    for mutant, number in zip(mutants, numbers, strict=True):
        switch = f"::emulator::mutant({number})"
        length = mutant.end - mutant.begin
        edits.append((mutant.begin, 1, -length, mutant.before.format(switch)))
        edits.append((mutant.end, 0, length, mutant.after.format(switch)))
    parts, last = [], 0
    for position, _, _, text in sorted(edits, key=lambda e: e[:3]):
        parts += [source[last:position], text]
        last = position
    return "".join([*parts, source[last:]])
