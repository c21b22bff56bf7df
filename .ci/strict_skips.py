"""A pytest plugin: a test that is skipped because a package is missing fails.

`make test` and `make test-all` install what their tests need, so there such a skip hides a test that nobody runs. Skips
that are about the machine (no GPU, little memory) stay skips. Loaded by ``pytest -p strict_skips``.
"""

import re

import pytest

# pytest.importorskip says the first, our own reasons the others.
MISSING = re.compile(r"could not import|no module named|not installed", re.IGNORECASE)


def _fail_where_a_package_is_missing(report):
    if report.skipped and isinstance(report.longrepr, tuple) and MISSING.search(report.longrepr[2]):
        path, line, reason = report.longrepr
        report.outcome = "failed"
        report.longrepr = f"{path}:{line}: {reason}: install it, or mark the test as `long`"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    _fail_where_a_package_is_missing(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    _fail_where_a_package_is_missing(report)
    return report
