from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROTOS = Path(__file__).resolve().parents[2] / "protos"


def test_the_checked_in_code_is_what_the_protos_make(tmp_path):
    sources = sorted(PROTOS.rglob("*.proto"))
    assert sources
    out = [f"--{kind}={tmp_path}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTOS}", *out, *sources], check=True)
    made = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*_pb2*.py*")}
    checked_in = {path.relative_to(PROTOS): path.read_bytes() for path in PROTOS.rglob("*_pb2*.py*")}
    checked_in = {path: data for path, data in checked_in.items() if "__pycache__" not in path.parts}
    assert made == checked_in
