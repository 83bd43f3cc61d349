"""The command itself: help, exit codes, one-line errors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxserve.cli import VERBS, main
from jaxserve.cli.parser import Parser, add_engine_options, engine_options
from jaxserve.config import read_yaml


def run(*args: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jaxserve", *args]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120, check=False)


def test_help_lists_the_verbs_with_examples(capsys: pytest.CaptureFixture[str]):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {verb}" in text for verb in VERBS)
    assert "examples:" in text
    assert main([]) == 2
    assert capsys.readouterr().out == text


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_teaches(verb: str, capsys: pytest.CaptureFixture[str]):
    assert main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.count(f"jaxserve {verb}") >= 3
    assert "examples:" in text


@pytest.mark.parametrize(
    "args, words",
    [
        (["srve"], "'srve' is not a verb"),
        (["serve", "--prot", "1"], "did you mean --port?"),
        (["serve", "--port", "x"], "--port"),
        (["serve", "--port", "70000"], "between 0 and 65535"),
        (["serve", "--dtype", "int3"], "--dtype 'int3' is not one of"),
        (["serve", "A", "--model", "B"], "given twice"),
        (["serve", "--config", "/nonexistent.yaml"], "/nonexistent.yaml"),
        (["batch", "-i", "x"], "-o"),
        (["batch", "-i", "x", "-o", "y", "--window", "0"], "--window 0 must be at least 1"),
        (["batch", "-i", "x", "-o", "y", "--window", "many"], "--window"),
        (["batch", "-i", "/nonexistent", "-o", "y", "--url", "http://127.0.0.1:9"], "/nonexistent does not exist"),
        (["batch", "-i", "x", "-o", "y", "--url", "http://127.0.0.1:9", "--model", "m"], "each line names its model"),
        (["complete", "x", "--url", "localhost"], "--url 'localhost' is not an address"),
        (["complete", "x", "--temperature", "warm"], "--temperature"),
        (["complete", ""], "empty"),
        (["complete", "x", "--kv-cache-memory", "64k"], "raise --kv-cache-memory"),
        (["chat", " "], "empty"),
        (["bench"], "throughput"),
        (["bench", "serve", "--client", "2"], "did you mean --clients?"),
        (["bench", "serve", "--input-len", "9:3"], "LOW not above HIGH"),
        (["bench", "serve", "--prompts", "/nonexistent"], "/nonexistent"),
        (["convert", "/nonexistent", "out"], "/nonexistent is not a folder"),
        (["convert", "a", "b", "--quantization", "int7"], "int7"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    args: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert main(args) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("jaxserve: ") and said.err.count("\n") == 1
    assert words in said.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text, words",
    [
        (b"port: [\n", "is not YAML: while parsing"),
        (b"? [1, 2]\n: 3\n", "is not YAML"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"- 1\n- 2\n", "must hold `option: value` lines"),
        (b"just words\n", "must hold `option: value` lines"),
        (b"max_num_seqs: 4\nmax-num-seqs: 8\n", "gives max_num_seqs twice"),
        (b"prot: 9000\n", "unknown option 'prot'; did you mean 'port'?"),
        (b"port: null\n", "--port needs a value"),
    ],
)
def test_a_config_file_that_is_wrong_is_one_line(
    text: bytes, words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    file = tmp_path / "server.yaml"
    file.write_bytes(text)
    assert main(["serve", "--config", str(file)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("jaxserve: ") and said.count("\n") == 1 and words in said


def test_an_empty_config_file_changes_nothing(tmp_path: Path):
    file = tmp_path / "empty.yaml"
    file.write_text("# nothing yet\n")
    assert read_yaml(file) == {}


def test_a_server_that_is_not_there_is_exit_code_1(capsys: pytest.CaptureFixture[str]):
    for args in (["complete", "x", "--url", "http://127.0.0.1:9"], ["bench", "serve", "--url", "http://127.0.0.1:9"]):
        assert main(args) == 1
        assert capsys.readouterr().err.startswith("jaxserve: http://127.0.0.1:9 does not answer")


def test_help_is_quick_and_loads_nothing_heavy():
    code = (
        "import sys; from jaxserve.cli import main; main(['--help']); main(['serve', '--help']); "
        "heavy = {'jax', 'numpy', 'fastapi', 'httpx', 'grain'} & set(sys.modules); sys.exit(str(heavy) if heavy else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False).returncode == 0
    bare = processor_s([sys.executable, "-c", ""])
    helping = processor_s([sys.executable, "-m", "jaxserve", "--help"])
    assert helping - bare < 0.3


def processor_s(command: list[str]) -> float:
    """The least of five runs: time of the processor, which other work on the machine does not use up."""
    least = float("inf")
    for _ in range(5):
        before = os.times()
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        after = os.times()
        spent = after.children_user + after.children_system - before.children_user - before.children_system
        least = min(least, spent)
    return least


def test_version():
    found = run("--version")
    assert found.returncode == 0 and found.stdout.startswith("jaxserve ")


def test_a_reader_that_goes_away_is_no_error():
    command = f"{sys.executable} -m jaxserve bench throughput --help | head -n 1; exit ${{PIPESTATUS[0]}}"
    found = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert found.returncode == 0 and found.stderr == ""


def test_options_of_file_and_flags_reach_the_library(tmp_path: Path):
    file = tmp_path / "engine.yaml"
    file.write_text("max-num-seqs: 8\ndtype: float32\n")
    parser = Parser("x", "", "")
    add_engine_options(parser)
    options = engine_options(parser.parse_args(["--config", str(file), "--max-num-seqs", "4", "--device", "cpu"]))
    assert (options["max_num_seqs"], options["dtype"], options["device"]) == (4, "float32", "cpu")
    assert os.environ["JAX_PLATFORMS"] == "cpu"
