"""Shared fixtures: every test runs with uninitialised memory full of NaN, so that an element nobody wrote shows."""

import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from ffkernels.backends.triton import support
from ffkernels.integrations import common

# What runs on a GPU does without it.
with suppress(ModuleNotFoundError):
    import hypothesis

    # The same cases at every run of one commit; `make properties` draws others, by Hypothesis's own profile.
    hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
    hypothesis.settings.load_profile("repeatable")

INTERPRETER = "test_kernels_in_the_interpreter"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What waits for a process that runs beside all other tests comes after them."""
    items.sort(key=lambda item: item.name == INTERPRETER)


@pytest.fixture(scope="session", autouse=True)
def interpreted(request: pytest.FixtureRequest) -> Iterator[Callable[[], tuple[int, str]]]:
    """Exit status and output of tests/interpreted, whose process begins with the session; it ends with it too."""
    if request.session.items[-1].name != INTERPRETER or not support._installed():
        yield pytest.fail
        return
    options = ["-q", "-x", "-p", "no:cacheprovider", "-W", "ignore"]
    # Its tensors are tiny, and the other core is taken.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *options, "tests/interpreted"],
            env=environment, cwd=Path(__file__).parents[1], stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip

        def wait() -> tuple[int, str]:
            status = process.wait()
            output.seek(0)
            return status, output.read()

        try:
            yield wait
        finally:
            process.kill()
            process.wait()


@pytest.fixture(autouse=True)
def poisoned_memory():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_forced_backend(monkeypatch):
    monkeypatch.delenv("FFKERNELS_BACKEND", raising=False)


@pytest.fixture
def fresh_warnings():
    """Each of the integrations' warnings comes anew, and one that no test expects is an error."""
    common.warn_once.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("default", category=DeprecationWarning, module=r"torch\.")  # torch's about torch
        yield
    common.warn_once.cache_clear()
