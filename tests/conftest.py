"""Settings for every test."""

import os

# Must be set before torch is imported: threads that spin while they wait make a busy machine ten times slower
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest

from tests.support.known_names import KnownNames


def pytest_configure(config: pytest.Config) -> None:
    """Where pytest's cache is used."""
    if config.pluginmanager.hasplugin("cacheprovider"):
        config.pluginmanager.register(KnownNames(config))
