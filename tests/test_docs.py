"""Every Python example of README.md runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = re.findall(r"^### (.+?)$|^## (.+?)$|^```python\n(.*?)^```", README, re.M | re.S)


def _examples() -> list[tuple[str, str]]:
    """(heading, all of the examples under it: a later one may go on from an earlier one)."""
    found: dict[str, str] = {}
    heading = ""
    for third, second, code in EXAMPLES:
        heading = third or second or heading
        if code:
            found[heading] = found.get(heading, "") + code
    return list(found.items())


@pytest.mark.parametrize(("heading", "code"), _examples(), ids=[heading for heading, _ in _examples()])
def test_example(heading: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("torchvision", "matplotlib"):
        if re.search(rf"import .*{package}", code) or (package == "matplotlib" and ".plot(" in code):
            pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(code, f"README.md: {heading}", "exec"), {"__name__": "example"})


def test_there_are_examples() -> None:
    assert len(_examples()) >= 7
