"""python -m sepconv_ext info: true facts, with and without rich, and never a GPU needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

import sepconv_ext
from harness import only_our_kernels
from sepconv_ext import __main__ as cli
from sepconv_ext import selfcheck


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "sepconv_ext", *arguments]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)


def test_info_in_a_process_without_a_gpu() -> None:
    result = run("info", CUDA_VISIBLE_DEVICES="", SEPCONV_STRICT="1", COLUMNS="200")
    assert result.returncode == 0, result.stderr
    for text in (sepconv_ext.__version__, torch.__version__, "no CUDA device is visible", "strict mode", "on: "):
        assert text in result.stdout


def test_json() -> None:
    result = run("info", "--json", SEPCONV_CPU_ISA="baseline", SEPCONV_STRICT="")
    facts = json.loads(result.stdout)
    build = sepconv_ext._C.build_info()
    assert facts["versions"]["sepconv_ext"] == sepconv_ext.__version__
    assert {"torch's CUDA", "NVIDIA driver", "C library", "system"} <= set(facts["versions"])
    assert facts["build"]["CPU instruction sets"] == ", ".join(build["cpu_isas"])
    assert facts["build"]["CUDA kernels"].startswith("yes" if build["cuda"] else "no")
    assert "baseline kernels" in facts["running"]["cpu"]
    assert facts["running"]["strict mode"].startswith("off")


def test_plain_text_says_the_same_as_the_table(capsys: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    cli.main(["info"])
    table = capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "rich.console", None)  # importing it now raises ImportError
    cli.main(["info"])
    plain = capsys.readouterr().out
    for section in cli.facts().values():
        for name, value in section.items():
            assert name in plain and value in plain
            assert name in table and value in table


def test_it_checks_each_family_and_fails_for_a_wrong_one(capsys: pytest.CaptureFixture, monkeypatch) -> None:
    """Each by a kernel of this package; a reference that says something else is an error of the command."""
    with only_our_kernels(at_least=len(selfcheck._FAMILIES)):
        assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["check"]
    assert len(found) >= len(selfcheck._FAMILIES) >= 11
    assert all(text.startswith("ok: ") and "no kernel" not in text for text in found.values()), found

    def wrong(device: str) -> tuple:
        return torch.ones(3), torch.tensor([1.0, 1.0, 1.001]).double()

    def fails(device: str) -> tuple:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(selfcheck, "_FAMILIES", {"depthwise": wrong, "pointwise": fails})
    assert cli.main(["info", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)["check"]
    assert found["depthwise, cpu"].startswith("WRONG: ")
    assert found["pointwise, cpu"] == "WRONG: RuntimeError: no such kernel"


def test_no_command_is_an_error() -> None:
    result = run()
    assert result.returncode == 2 and "info" in result.stderr
