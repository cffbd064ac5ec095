"""The compiled kernels for the CPU; csrc/bind_cpu.cpp."""

from collections.abc import Callable

def use_instruction_set(name: str) -> str:
    """Use "baseline" or "avx2", or the best one for ""; return the one in use. Raises ValueError."""

def instruction_set() -> str:
    """Return the instruction set in use."""

def __getattr__(name: str) -> Callable[..., None]:
    """NAME_f32 or NAME_f64: takes the addresses of `csrc/arguments.h` in their order, and sizes."""
