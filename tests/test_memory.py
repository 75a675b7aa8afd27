"""Freed memory is kept where the allocator can be told so."""

import ctypes
import sys

import pytest

from genfw.train.memory import keep_freed_memory


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_glibc_agrees():
    assert keep_freed_memory()


def test_another_allocator_is_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not keep_freed_memory()
