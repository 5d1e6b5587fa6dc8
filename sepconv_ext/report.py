"""What convert_ or freeze did, as data and as a table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from . import _table

__all__ = ["Entry", "Report"]

# What finds no convolution, without a word, in a model whose convolutions are of other classes and ops than torch's.
_NOTE = (
    "revert_(model) comes before tools that go by the class nn.Conv2d or the op aten.conv2d: quantisation (eager, FX, "
    "PT2E), fuse_modules, FLOP counters by class, initialisation by type(m), torch.jit.script, ONNX without dynamo."
)
_COLUMNS = ("outcome", "family", "count", "modules")
_COST_COLUMNS = ("cost", "before", "after")


@dataclass(frozen=True)
class Entry:
    """One convolution, linear layer, batch norm, chain or block that was looked at."""

    name: str  # as in model.named_modules(), a chain's as "first -> second"; "" is the model itself
    family: str  # depthwise, pointwise, grouped or dense; separable for a chain of the first two; batch norm
    summary: str  # the module's arguments, as it prints them, or a chain's parts
    reason: str = ""  # why it was skipped, left or not fused; empty where all was done

    def __str__(self) -> str:
        text = f"{self.name or '(the model itself)'}: {self.family} ({self.summary})"
        return f"{text}: {self.reason}" if self.reason else text


@dataclass(repr=False)
class Report:
    """What convert_ or freeze did; prints as a table.

    Iterates over the replaced entries and counts them, so it is false where nothing was replaced.

    Attributes:
        replaced, skipped: the convolutions. By freeze also:
        fused: the chains that run as one op.
        folded: the batch norms that are part of their convolution's weights.
        blocks: what it recognised as a block of several convolutions.
        programs: the parts of a network that are one call, from the first layer to the last; with a count of steps.
        left: the modules that it could not capture, and why.
        costs: {"parameters": (before, after), "MACs": ..., "bytes": ...} of one run on the example.
    """

    replaced: list[Entry] = field(default_factory=list)
    skipped: list[Entry] = field(default_factory=list)
    fused: list[Entry] = field(default_factory=list)
    folded: list[Entry] = field(default_factory=list)
    blocks: list[Entry] = field(default_factory=list)
    programs: list[Entry] = field(default_factory=list)
    left: list[Entry] = field(default_factory=list)
    costs: dict[str, tuple[int, int]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.replaced)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.replaced)

    @property
    def headline(self) -> str:
        looked_at = [*self.replaced, *self.skipped]
        total = len(looked_at)
        linear = any(entry.family == "linear" for entry in looked_at)
        what = "convolutions and linear layers" if linear else "convolutions"
        text = f"sepconv_ext: {len(self.replaced)} of {total} {what} replaced"
        if self.fused:
            separable = sum(entry.family == "separable" for entry in self.fused)
            norms = sum(entry.family == "batch norm" for entry in self.folded)
            text += f", {len(self.fused)} chains fused ({separable} separable), {norms} batch norms folded"
        return text

    def rows(self) -> list[tuple[str, str, str, str]]:
        """(outcome, family, count, which), one row for each outcome and family."""
        groups: dict[tuple[str, str], list[str]] = {}
        outcomes = {
            "replaced": self.replaced,
            "fused": self.fused,
            "folded": self.folded,
            "block": self.blocks,
            "one call": self.programs,
            "skipped": self.skipped,
            "left": self.left,
        }
        for outcome, entries in outcomes.items():
            for entry in entries:
                key = f"{outcome}: {entry.reason}" if entry.reason else outcome, entry.family
                groups.setdefault(key, []).append(entry.name or "(the model itself)")
        return [(outcome, family, str(len(names)), _abridged(names)) for (outcome, family), names in groups.items()]

    def _tables(self) -> list[tuple]:
        """The arguments of each table."""
        tables: list[tuple] = [(self.headline, _COLUMNS, self.rows(), ("count",))]
        if self.costs:
            rows = [(what, f"{before:,}", f"{after:,}") for what, (before, after) in self.costs.items()]
            tables.append(("one run on the example", _COST_COLUMNS, rows, _COST_COLUMNS[1:]))
        return tables

    @property
    def note(self) -> str:
        """What the replaced convolutions are not found by; empty where nothing was replaced."""
        return _NOTE if self.replaced else ""

    def __rich__(self):
        from rich.console import Group

        return Group(*(_table.rich_table(*table) for table in self._tables()), self.note)

    def __str__(self) -> str:
        return "\n".join([*(_table.text(*table) for table in self._tables()), *filter(None, [self.note])])

    __repr__ = __str__


def _abridged(names: Iterable[str], shown: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:shown]) + (f", and {len(names) - shown} more" if len(names) > shown else "")
