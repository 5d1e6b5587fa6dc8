"""README.md and docs/: every example runs as it stands, links lead somewhere, and the tables are the plan's own.

The front page stays one that can be read in two minutes, and no table has a cell that fills a screen.
"""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

import sepconv_ext

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "benchmarks" / "notes").glob("*.md"),
    ]
)
WHAT_RUNS_WHERE = ROOT / "docs" / "what-runs-where.md"
_BLOCK = re.compile(r"^#+ (.+?)$|^```python\n(.*?)^```", re.M | re.S)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _examples() -> list[tuple[str, str]]:
    """(page and heading, all of the examples under it: a later one may go on from an earlier one)."""
    found: dict[str, str] = {}
    for page in PAGES:
        heading = ""
        for title, code in _BLOCK.findall(page.read_text()):
            heading = title or heading
            if code:
                name = f"{name_of(page)}: {heading}"
                found[name] = found.get(name, "") + code
    return list(found.items())


@pytest.mark.parametrize(("name", "code"), _examples(), ids=[name for name, _ in _examples()])
def test_example(name: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("torchvision", "matplotlib"):
        if re.search(rf"import .*{package}", code) or (package == "matplotlib" and ".plot(" in code):
            pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, name, "exec"), {"__name__": "example"})


def test_there_are_examples() -> None:
    assert len(_examples()) >= 11


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.S)
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^()\s]+)\)", text)]
    missing = [t for t in targets if t and "://" not in t and not (page.parent / t).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_lines_and_cells_have_a_width(page: Path) -> None:
    """Prose and code within 120 columns; a cell of a table within 160 characters."""
    lines = page.read_text().splitlines()
    long = [line for line in lines if len(line) > 120 and not line.lstrip().startswith("|")]
    long += [cell for line in lines if line.lstrip().startswith("|") for cell in line.split("|") if len(cell) > 160]
    assert not long


def sentences(page: Path) -> list[str]:
    """What the page says, without its tables and code; what stands in backticks is one word."""
    text = re.sub(r"(?s:```.*?```)|^ *(?:[|#]|:::).*", "\n\n", page.read_text(), flags=re.M)
    text = re.sub(r"`[^`]*`", "code", text)
    text = re.sub(r"\]\([^()]*\)", "]", text)
    paragraphs = re.split(r"\n\s*\n|\n *(?:-|\d+\.) ", text)
    return [s for paragraph in paragraphs for s in re.split(r"(?<=[.!?:;])\s", " ".join(paragraph.split()))]


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent.name != "notes"], ids=name_of)
def test_sentences_are_short(page: Path) -> None:
    assert not [s for s in sentences(page) if len(re.findall(r"\w\S*", s)) > 30]


def test_the_front_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


SCRIPT = runpy.run_path(str(ROOT / "docs" / "what_runs_where.py"))
AGAIN = "the plan has changed: run `make docs-data`, and commit the page"


def test_the_docstring_lists_the_activations() -> None:
    listed = sepconv_ext.functional.depthwise_conv2d.__doc__.partition("activation:")[2].partition("padding_mode:")[0]
    assert set(re.findall(r"``(\w+)``", listed)) == set(sepconv_ext._C.activations())


def test_what_runs_where_on_a_cpu() -> None:
    assert SCRIPT["parts_of"](WHAT_RUNS_WHERE.read_text())["cpu"] == SCRIPT["cpu_part"](), AGAIN


@pytest.mark.emulated
@pytest.mark.skipif(SCRIPT["emulator"]().why_not() is not None, reason=str(SCRIPT["emulator"]().why_not()))
def test_what_runs_where_on_a_gpu() -> None:
    """Planned for a GPU that need not be there, by g++'s build of the plan."""
    assert SCRIPT["parts_of"](WHAT_RUNS_WHERE.read_text())["gpu"] == SCRIPT["gpu_part"](), AGAIN


def test_asking_the_plan_changes_no_setting() -> None:
    before = torch.get_num_threads(), sepconv_ext._C.strict()
    SCRIPT["cpu_part"]()
    assert (torch.get_num_threads(), sepconv_ext._C.strict()) == before


def test_a_cell_names_the_runs() -> None:
    cell = SCRIPT["cell"]
    sizes = [(7, 7), (14, 14), (28, 28), (56, 56)]
    assert cell([(size, "a") for size in sizes]) == "a"
    assert cell(list(zip(sizes, "abbc", strict=True))) == "a to 7, b 14 to 28, c from 56"
    assert cell(list(zip(sizes, "abcc", strict=True))) == "a to 7, b 14, c from 28"
