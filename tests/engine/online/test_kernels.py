"""Every kernel that Python calls is on the list, and none is compiled, or even loaded, once a server serves."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from engine.online.kernels import Kernel, compile_all, listed, missing

SCRIPT = Path(__file__).parent / "kernel_calls.py"


def calls(folder: Path, kind: str) -> dict[str, list[Kernel]]:
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), kind], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {name: [Kernel(*each) for each in found] for name, found in json.loads(done.stdout).items()}


LEARNT = (
    "channels.two_tower",
    "channels.deep_retrieval",
    "channels.streaming_vq",
    "engine.ann.",
    "engine.models.",
)
"""Where the kernels are that the channels call besides which came with the sample, trained; they are in no other."""


def differences(found: list[Kernel]) -> set[Kernel]:
    # Swing draws users only where an item has more than most data sets' items.
    rare = {kernel for kernel in listed() if (kernel.module, kernel.name) == ("channels.swing", "_draw")}
    learnt = {kernel for kernel in listed() if kernel.module.startswith(LEARNT)}
    return (set(found) ^ set(listed())) - rare - learnt


def test_the_list_holds_what_a_build_and_a_server_call_and_nothing_is_first_called_while_serving(
    tmp_path: Path,
) -> None:
    found = calls(tmp_path / "first", "int64")
    if differences(found["called"]):  # some were compiled: those that kernels called cannot be told apart
        found = calls(tmp_path / "second", "int64")
    assert not differences(found["called"]), "run `python -m engine.bench.signatures`"
    assert found["late"] == []


def test_with_ids_that_are_strings_nothing_is_first_called_while_serving_either(tmp_path: Path) -> None:
    assert calls(tmp_path / "strings", "string")["late"] == []


def test_compiling_ahead_goes_through_the_whole_list_once() -> None:
    done: list[int] = []
    compile_all(lambda: done.append(1), processes=2)
    assert len(done) == len(listed())
    assert not missing()


def test_a_process_that_fails_leaves_its_share_to_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    compile_all(lambda: None, processes=2)
