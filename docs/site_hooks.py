"""mkdocs' hooks: pages that stand elsewhere in the repository, and links that hold on the site and in the repository.

A page is written for a reader of the repository: its links are relative to its own file. Here each link to a file that
the site has becomes a link to that page. A link to any other file of the repository becomes plain text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent

# Where the repository has a page, and where the site has it.
ELSEWHERE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "tests/emulator/README.md": "how/emulator.md",
    "benchmarks/README.md": "notes/benchmark.md",
    "benchmarks/notes/README.md": "notes/notes.md",
}
ELSEWHERE |= {
    f"benchmarks/notes/{path.name}": f"notes/{path.name}"
    for path in sorted((ROOT / "benchmarks" / "notes").glob("*.md"))
    if path.name != "README.md"
}
ELSEWHERE |= {
    f"benchmarks/results/{path.parent.name}/summary.md": f"results/{path.parent.name}.md"
    for path in sorted((ROOT / "benchmarks" / "results").glob("20*/summary.md"))
}
_SOURCE = {page: source for source, page in ELSEWHERE.items()}
_LINK = re.compile(r"(!?)\[([^\[\]]*)\]\(([^()\s]+)\)")


def on_files(files, config):
    for source, page in ELSEWHERE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown, page, config, files):
    here = page.file.src_uri
    folder = posixpath.dirname(_SOURCE.get(here, f"docs/{here}"))

    def link(match: re.Match) -> str:
        image, text, target = match.groups()
        path, _, anchor = target.partition("#")
        if not path or "://" in target or target.startswith("mailto:"):
            return match[0]
        source = posixpath.normpath(posixpath.join(folder, path))
        goal = ELSEWHERE.get(source, source.removeprefix("docs/") if source.startswith("docs/") else None)
        if goal is None:
            if not (ROOT / source).exists():
                raise FileNotFoundError(f"{here}: the link {target} leads to {source}, which does not exist")
            return text
        relative = posixpath.relpath(goal, posixpath.dirname(here) or ".")
        return f"{image}[{text}]({relative}{'#' + anchor if anchor else ''})"

    return _LINK.sub(link, markdown)
