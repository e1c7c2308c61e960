"""The only reasons for which a test may be skipped, and the marks that use them."""

from __future__ import annotations

import functools
import shutil

import pytest

NO_GPU = "no GPU"
NO_CHROMIUM = "no Chromium"
NO_XFORMERS = "no xformers"
REASONS = (NO_GPU, NO_CHROMIUM, NO_XFORMERS)


@functools.cache
def has_gpu() -> bool:
    """Whether torch can use a CUDA device."""
    import torch

    return torch.cuda.is_available()


@functools.cache
def has_xformers() -> bool:
    """Whether one real call of xformers works; being installed is not enough."""
    try:
        import torch
        from xformers.ops import memory_efficient_attention

        query = torch.zeros(1, 4, 1, 32, device="cuda" if has_gpu() else "cpu")
        memory_efficient_attention(query, query, query)
    except (ImportError, NotImplementedError, RuntimeError):
        return False
    return True


def chromium() -> str | None:
    """The path of a Chromium or Chrome, or None."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next((path for path in map(shutil.which, names) if path), None)


def needs_gpu() -> pytest.MarkDecorator:
    """Mark: skipped without a GPU."""
    return pytest.mark.skipif(not has_gpu(), reason=NO_GPU)


def needs_xformers() -> pytest.MarkDecorator:
    """Mark: skipped when xformers cannot make one call."""
    return pytest.mark.skipif(not has_xformers(), reason=NO_XFORMERS)


def needs_chromium() -> pytest.MarkDecorator:
    """Mark: skipped without a browser."""
    return pytest.mark.skipif(chromium() is None, reason=NO_CHROMIUM)
