"""The memory and the threads of a process that computes on the CPU."""

import ctypes
import mmap
import os
import platform
import sys
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h; see mallopt(3)
# Of a page in /proc/self/pagemap: it is in memory, in the swap, or the page of a file unchanged.
_PRESENT, _SWAPPED, _OF_FILE = 1 << 63, 1 << 62, 1 << 61


def wait_passively() -> None:
    """Have OpenMP's threads sleep while they wait, unless the user has said how they shall wait.

    By itself they spin, and keep the processor from whoever has the work to be waited for: on a
    machine with other work a picture took four times as long. To be called before torch is loaded,
    in a process of our own.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the tensors to come; elsewhere this does nothing.

    By itself it gives a large tensor's memory back to the kernel when the tensor goes, which must
    then find and zero each page again for the next one: a third of a training step of a U-Net of
    Stable Diffusion's size. The process stays as large as it ever was. It holds for all of the
    process, so it is for our own alone: the command line's and those of training scripts.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, -1)


def let_go_of_pages(address: int, length: int) -> None:
    """Have Linux forget memory that is mapped from a file, to read it again when it is asked for.

    Memory that is no file's, or that was written to since, stays, and so does all of it on other
    systems. Nobody may write to it meanwhile.

    Args:
        address: of the first byte.
        length: in bytes; pages that reach beyond stay.
    """
    if sys.platform != "linux":
        return
    first = -(-address // mmap.PAGESIZE)
    count = (address + length) // mmap.PAGESIZE - first
    if count <= 0:
        return
    try:
        with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
            pages = os.pread(pagemap.fileno(), 8 * count, 8 * first)
    except OSError:  # a process that may not look at itself
        return
    import numpy as np

    flags = np.frombuffer(pages, dtype="<u8")
    own = (flags & _SWAPPED != 0) | ((flags & _PRESENT != 0) & (flags & _OF_FILE == 0))
    if len(flags) == count and not own.any():
        start, size = ctypes.c_void_p(first * mmap.PAGESIZE), ctypes.c_size_t(count * mmap.PAGESIZE)
        ctypes.CDLL(None).madvise(start, size, mmap.MADV_DONTNEED)
