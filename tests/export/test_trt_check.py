"""The check with NVIDIA's parser: what it says about the bad graphs, and what becomes of crashes and time-outs.

Where the package is meant to be there, set EDGE_ANOMALY_REQUIRE_TRT_CHECK=1, so that its absence fails the tests.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import onnx
import pytest

from edge_anomaly_export.trt_check import CheckResult, ParserError, check_with_nvidia, is_installed
from edge_anomaly_runtime.errors import EdgeAnomalyError, MissingRequirementError
from tests.export.bad_graphs import BAD, GOOD, BadGraph

with_parser = pytest.mark.skipif(
    not is_installed(), reason='NVIDIA\'s parser is not installed: pip install "edge-anomaly[trt-check]"'
)


@pytest.mark.skipif("EDGE_ANOMALY_REQUIRE_TRT_CHECK" not in os.environ, reason="the parser is not asked for")
def test_the_parser_is_installed_where_it_is_asked_for() -> None:
    assert is_installed()


# The real parser and builder


@with_parser
@pytest.mark.parametrize("build", GOOD.values(), ids=list(GOOD))
def test_a_good_graph_is_parsed_and_built(build: Callable[[], onnx.ModelProto]) -> None:
    result = check_with_nvidia(build().SerializeToString())
    assert result.ok, result
    assert (result.errors, result.log_errors, result.crash) == ((), (), "")
    assert result.plan_bytes > 1000
    assert result.seconds > 0
    assert result.version.count(".") == 3
    assert str(result).startswith(f"TensorRT for RTX {result.version} builds the graph: ")


@with_parser
@pytest.mark.parametrize("bad", BAD, ids=lambda bad: f"{bad.code}-{bad.name}")
def test_a_bad_graph_gets_the_verdict_that_the_corpus_states(bad: BadGraph) -> None:
    result = check_with_nvidia(bad.build().SerializeToString())
    assert result.crash == ""
    assert (result.parsed, result.built) == (bad.nvidia != "parser refuses", bad.nvidia == "builds"), result
    assert bool(result.errors) == (bad.nvidia == "parser refuses")
    assert bool(result.log_errors) == (bad.nvidia != "builds")
    if result.errors and result.errors[0].node:  # a refused initialiser belongs to no node
        assert result.errors[0].node == bad.node
        assert repr(bad.node) in str(result)


@with_parser
def test_unsigned_values_are_read_as_signed_with_no_more_than_a_warning() -> None:
    """Why the lint refuses what the parser takes."""
    (unsigned,) = (bad for bad in BAD if bad.code == "TRT002")
    result = check_with_nvidia(unsigned.build().SerializeToString())
    assert result.ok
    assert any("uint8" in line.lower() for line in result.log_warnings), result.log_warnings


@with_parser
@pytest.mark.parametrize("content", [b"", b"no graph at all"], ids=["empty", "text"])
def test_what_is_no_graph_is_refused(content: bytes) -> None:
    result = check_with_nvidia(content)
    assert (result.ok, result.crash) == (False, "")
    assert result.log_errors


@with_parser
def test_the_missing_driver_is_not_blamed_on_the_graph() -> None:
    for bad in BAD:
        if bad.nvidia != "builds":
            result = check_with_nvidia(bad.build().SerializeToString())
            assert "driver" not in " ".join((str(result), *result.log_errors, *(e.description for e in result.errors)))


# A package in its place, found before the real one by this process and by the one that checks

FAKE = """
class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO = range(4)

class Builder:
    def __init__(self, logger):
        self.logger = logger
    def create_network(self, flags):
        return object()
    def create_builder_config(self):
        return None
    def build_serialized_network(self, network, config):
        print("a line of the library's own")
        self.logger.log(ILogger.ERROR, "out of tactics\\n(cudaError 35: no driver)")
        self.logger.log(ILogger.INFO, "chatter")
        self.logger.log(ILogger.ERROR, "(cudaError 35: no driver)")

class OnnxParser:
    num_errors = 0
    def __init__(self, network, logger):
        self.logger = logger
    def parse(self, model):
        self.logger.log(ILogger.WARNING, f"{len(model)} bytes")
        return True

__version__ = "9.9"
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return the function that puts a package tensorrt_rtx of the given code in place of the real one."""

    def installed(code: str) -> None:
        (tmp_path / "tensorrt_rtx.py").write_text(dedent(code), encoding="utf-8")
        monkeypatch.delitem(sys.modules, "tensorrt_rtx", raising=False)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")])))

    return installed


Install = Callable[[str], None]


def test_a_build_that_fails_without_an_exception_is_a_failure(install: Install) -> None:
    install(FAKE)
    result = check_with_nvidia(b"12345")
    assert (result.version, result.parsed, result.built, result.plan_bytes) == ("9.9", True, False, 0)
    assert result.log_warnings == ("5 bytes",)
    assert result.log_errors == ("out of tactics",)
    assert str(result) == "TensorRT for RTX 9.9 cannot build the graph: out of tactics"


def test_a_native_crash_is_reported(install: Install) -> None:
    install("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    result = check_with_nvidia(b"")
    assert not result.ok
    assert str(result) == "TensorRT for RTX crashed (SIGSEGV)"


def test_a_check_that_takes_too_long_is_stopped(install: Install) -> None:
    install("import time; time.sleep(60)")
    result = check_with_nvidia(b"", timeout_s=0.5)
    assert not result.ok
    assert str(result) == "TensorRT for RTX was stopped after 0.5 s"


def test_a_package_that_cannot_be_loaded_is_a_missing_requirement(install: Install) -> None:
    install("raise ImportError('libnvonnxparser.so.11: cannot open shared object file')")
    with pytest.raises(MissingRequirementError, match=r"cannot be loaded: libnvonnxparser\.so\.11") as caught:
        check_with_nvidia(b"")
    assert "--force-reinstall" in caught.value.hint


def test_a_fault_of_the_check_itself_is_not_taken_for_a_verdict(install: Install) -> None:
    install("class ILogger: pass")
    with pytest.raises(EdgeAnomalyError, match=r"ended with code 1: .*AttributeError"):
        check_with_nvidia(b"")


def test_without_the_package_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    assert not is_installed()
    with pytest.raises(MissingRequirementError, match="needs the package tensorrt_rtx") as caught:
        check_with_nvidia(b"")
    assert caught.value.exit_code == 3
    assert caught.value.hint == 'Run: pip install "edge-anomaly[trt-check]"'


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (CheckResult("1.2", True, built=True, plan_bytes=2_500_000, seconds=0.25), "builds the graph: 2.5 MB in 0.2 s"),
        (CheckResult("1.2", log_errors=("first", "last\nline")), "cannot read the graph: line"),
        (CheckResult("1.2", True), "cannot build the graph: it gives no reason"),
        (
            CheckResult("1.2", errors=(ParserError("n", "Conv", "Invalid Node\nwrong type"),)),
            "cannot read node 'n' (Conv): wrong type",
        ),
    ],
)
def test_the_verdict_is_one_line(result: CheckResult, text: str) -> None:
    assert str(result) == f"TensorRT for RTX 1.2 {text}"
