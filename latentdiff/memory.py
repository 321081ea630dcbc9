"""The memory of a process that computes on the CPU."""

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h; see mallopt(3)


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
