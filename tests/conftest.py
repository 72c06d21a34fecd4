"""Settings of every test: how many examples, what is skipped, and what no test may leave behind."""

import os
import signal

import pytest
from hypothesis import settings

import xuracore as xc

# A kernel compiles inside its first example, so no example has a deadline.
settings.register_profile("dev", max_examples=20, deadline=None, print_blob=True)
settings.register_profile("ci", max_examples=50, deadline=None, print_blob=True, derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config, items):
    asked = config.getoption("markexpr")
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow") and "slow" not in asked:
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
        if item.get_closest_marker("bench") and "bench" not in asked:
            item.add_marker(pytest.mark.skip(reason="measures time: run with -m bench"))
    items.sort(key=lambda item: item.name == "test_no_kernel_has_more_than_two_builds")  # it looks back on all


@pytest.fixture
def interruptible():
    """SIGINT raises KeyboardInterrupt, also where the tests run in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def _nothing_leaks():
    """A test that leaves gradients switched off or another thread count would change its neighbours."""
    threads = xc.get_num_threads()
    yield
    leaked_mode, leaked_threads = not xc.is_grad_enabled(), xc.get_num_threads()
    if leaked_threads != threads:
        xc.set_num_threads(threads)
    assert not leaked_mode, "the test left gradient recording switched off"
    assert leaked_threads == threads, f"the test left {leaked_threads} threads; there were {threads}"
