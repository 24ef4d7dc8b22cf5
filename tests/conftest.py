"""Settings for every test."""

import gc
import os
import signal

# Must be set before torch is imported: threads that spin while they wait make a busy machine ten times slower
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest

from tests.support.known_names import KnownNames


def pytest_configure(config: pytest.Config) -> None:
    """Ctrl-C reaches the servers that tests start, even where the shell began the tests in the background; and pytest's cache."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # which they would inherit, and end by being killed a minute later
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.pluginmanager.hasplugin("cacheprovider"):
        config.pluginmanager.register(KnownNames(config))


@pytest.fixture(scope="module", autouse=True)
def quick_garbage_collection() -> None:
    """What is there already isn't looked through again: the host and training collect often, half a second for all that is imported."""
    gc.collect()
    gc.freeze()
