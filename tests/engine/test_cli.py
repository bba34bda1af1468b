"""The command line: what a user types wrong is named, and every kind of input can be made up."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from engine.cli import main


@pytest.fixture
def strings(tmp_path: Path) -> str:
    return _identity(tmp_path, TensorProto.STRING)


@pytest.fixture
def floats(tmp_path: Path) -> str:
    return _identity(tmp_path, TensorProto.FLOAT)


def _identity(folder: Path, kind: int) -> str:
    x, y = (helper.make_tensor_value_info(name, kind, ["n", 3]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "identity", [x], [y])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    path = folder / "identity.onnx"
    path.write_bytes(proto.SerializeToString())
    return str(path)


def test_a_model_of_strings_runs_on_made_up_ones(strings: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", strings, "--device", "cpu", "--size", "n=2"]) == 0
    assert capsys.readouterr().out.startswith("y: object[2, 3] ['")
    assert main(["check", strings, "--device", "cpu"]) == 0


def test_strings_go_from_file_to_file(strings: str, tmp_path: Path) -> None:
    words = np.array([["a", "bcd", "é"]])
    np.save(tmp_path / "x.npy", words)
    given = f"x={tmp_path / 'x.npy'}"
    assert main(["run", strings, "--device", "cpu", "--input", given, "--output", str(tmp_path)]) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy", allow_pickle=False), words)


@pytest.mark.parametrize("content", [b"root:x:0:0\n", b"", b"PK\x03\x04"], ids=["text", "empty", "zip"])
def test_a_file_that_is_no_npy_is_named(
    floats: str, tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "passwd"
    path.write_bytes(content)
    assert main(["run", floats, "--device", "cpu", "--input", f"x={path}"]) == 2
    error = capsys.readouterr().err
    assert f"{path} is not read, an .npy file is expected" in error
    assert "pickle" not in error


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [("run", "--seed", "-1"), ("run", "--seed", "x"), ("check", "--tolerance", "nan"), ("check", "--tolerance", "-1")],
)
def test_a_wrong_number_is_a_usage_error_that_names_the_option(
    floats: str, command: str, option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, floats, f"{option}={value}"])
    assert ended.value.code == 2
    assert f"argument {option}: '{value}' is no" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["inspect"], ["profile", "--runs", "1", "--json"]], ids=lambda words: words[0])
def test_a_reader_that_has_enough_is_no_error(floats: str, command: list[str]) -> None:
    words = [sys.executable, "-m", "engine", *command, floats, "--device", "cpu"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
