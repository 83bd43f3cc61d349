"""A pytest plugin for .ci/run: the run fails when tests marked `hopper` were skipped, or none passed or failed."""

from __future__ import annotations

import pytest

ran: set[str] = set()
skipped: set[str] = set()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if "hopper" not in report.keywords:
        return
    if report.skipped:
        skipped.add(report.nodeid)
    elif report.when == "call":
        ran.add(report.nodeid)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput"):
        return  # one of several processes that share the tests; the one above them sees all reports
    if (skipped or not ran) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for name in sorted(skipped):
        terminalreporter.write_line(f"FAILED: {name} compiles for a Hopper GPU and must not be skipped here", red=True)
    if not ran and not skipped:
        terminalreporter.write_line("FAILED: no test that compiles for a Hopper GPU ran", red=True)
