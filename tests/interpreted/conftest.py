"""Kernels in Triton's interpreter. Triton reads TRITON_INTERPRET when it is imported, so these tests need a process of
their own: `test_triton.py` starts it, and in any other they are left out."""

import os

import pytest


def pytest_collection_modifyitems(items):
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    for item in items:
        if "interpreted" in item.path.parts:
            item.add_marker(pytest.mark.skip(reason="runs under TRITON_INTERPRET=1, as test_triton.py starts it"))


@pytest.fixture(autouse=True)
def triton_backend(no_forced_backend, monkeypatch):
    monkeypatch.setenv("FFKERNELS_BACKEND", "triton")
