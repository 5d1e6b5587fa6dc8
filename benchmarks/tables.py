"""``python -m benchmarks.tables [PAGE ...]``: the predicted tables of benchmarks/notes, made anew.

A note's table stands between two comments. The first says what is predicted, one thing after the other: the GPU,
numbers of images, dtypes, layout, and layers (by their label in layers.csv, or in the words of --layer, to which
activation= and residual=1 may be added for the forward call):

    <!-- predicted: H200; 64, 1; float16, float32; channels_last; dw5x5 240 @28x28; C=96 H=27 R=7 -->
    ...
    <!-- end of what was predicted, 0123456789ab -->

In the place of layers stand the inverted residual blocks of a network (benchmarks/blocks.py) in

    <!-- predicted: H200; 128; blocks of mobilenet_v2 -->

The second comment has a digest of both: a table that was changed by hand is seen (tests/test_predict.py).
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from . import blocks, layers, predict, sweep

NOTES = Path(__file__).with_name("notes")
BLOCK = re.compile(r"<!-- predicted: (.*?) -->\n(.*?)<!-- end of what was predicted, (\w+) -->", re.DOTALL)


def digest(asked: str, table: str) -> str:
    return hashlib.sha256(f"{' '.join(asked.split())}\n{table}".encode()).hexdigest()[:12]


def changed_by_hand(text: str) -> list[str]:
    """What the tables of a page are of, where they are not what was written."""
    return [asked for asked, table, own in BLOCK.findall(text) if digest(asked, table) != own]


def cell(gpu: predict.Gpu, layer: layers.Layer, map: str, dtype: str, layout: str, batch: int, **finish: object) -> str:
    """Microseconds of a call, the share of the floor that this is, and what bounds its longest launch."""
    if finish and map != "forward":
        return "-"
    made = predict.predict(gpu, layer, map, dtype, layout, batch, executed=sweep.EXECUTED, **finish)
    if isinstance(made, str):
        if made.endswith("which is torch's"):
            return "torch's"
        raise SystemExit(made)
    longest = max(made.launches, key=lambda launch: launch.microseconds)
    return f"{made.microseconds:.1f}: {made.floor_us / made.microseconds:.0%}, {longest.bound}"


def table(asked: str) -> str:
    """The lines of a table, as its first comment asks for it."""
    name, batches, *rest = (" ".join(word.split()) for word in asked.split(";"))
    if rest[0].startswith("blocks of "):
        made = blocks.table(predict.gpus()[name], rest[0].removeprefix("blocks of "), int(batches))
        return "\n".join(["", *made, "", ""])
    dtypes, layout, *labels = rest
    known = {layer.label: layer for layer in layers.load()}
    lines = ["", f"| layer | N, dtype | {' | '.join(layers.MAPS)} |", "| --- |" + " --- |" * (1 + len(layers.MAPS))]
    for label in labels:
        finish = dict(word.split("=") for word in label.split() if word.startswith(("activation=", "residual=")))
        words = " ".join(word for word in label.split() if word.partition("=")[0] not in finish)
        layer = known.get(label) or predict.layer_of(words)
        behind = "".join(f", {key} {value}" if key == "activation" else f", {key}" for key, value in finish.items())
        for batch in map(int, batches.split(",")):
            for dtype in dtypes.split(", "):
                gpu = predict.gpus()[name]
                cells = [cell(gpu, layer, each, dtype, layout, batch, **finish) for each in layers.MAPS]
                lines.append(f"| {layer.label}{behind} | {batch}, {dtype} | {' | '.join(cells)} |")
                print(lines[-1], flush=True)
    return "\n".join([*lines, "", ""])


def rewrite(text: str) -> str:
    def block(found: re.Match[str]) -> str:
        made = table(found[1])
        return f"<!-- predicted: {found[1]} -->\n{made}<!-- end of what was predicted, {digest(found[1], made)} -->"

    return BLOCK.sub(block, text)


def main(names: Sequence[str]) -> int:
    pages = [NOTES / f"{name}.md" for name in names] or sorted(NOTES.glob("*.md"))
    for page in pages:
        page.write_text(rewrite(page.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
