"""The memory and the threads of a process that computes on the CPU."""

import ctypes
import os
import platform

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h; see mallopt(3)


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
