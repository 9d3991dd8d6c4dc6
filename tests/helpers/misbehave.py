"""A decoder that does as a word says: it crashes, hangs, is killed or refuses; light, as every process imports it."""

import ctypes
import errno
import os
import signal
import time
import warnings

from cache_tools.images import PictureRefused

REASONS = {"SIGSEGV": "decoder-crash", "SIGABRT": "decoder-crash", "HANG": "timeout"}
DETAILS = {"decoder-crash": "its decoder crashed", "timeout": "its decoder did not finish"}


def misbehave(word: str, refuse: bool = False) -> str:
    """Do as `word` says; with `refuse`, refuse it as the pool is to do."""
    if refuse and word in REASONS:
        raise PictureRefused(REASONS[word], DETAILS[REASONS[word]])
    if word == "SIGSEGV":
        ctypes.string_at(0)
    if word == "SIGABRT":
        os.abort()
    if word == "SIGKILL":
        os.kill(os.getpid(), signal.SIGKILL)
    if word == "HANG":
        time.sleep(1e6)
    if word == "REFUSED":
        raise PictureRefused("format", "of no kind")
    if word == "WARNS":
        with warnings.catch_warnings(record=True) as shown:
            warnings.warn_explicit("odd metadata", UserWarning, "Image.py", 1, "PIL.Image")
        assert not shown
    if word == "EIO":
        raise OSError(errno.EIO, "Input/output error", "1.png")
    return word
