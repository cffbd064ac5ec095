"""The compiled kernels for CUDA; csrc/bind_cuda.cu. Absent from a build without a CUDA compiler."""

from collections.abc import Callable

built_for: int

def probe(device: int) -> str:
    """Return "" if the kernels run on the device of that number, else why not."""

def driver_version() -> int:
    """Return the newest CUDA that the installed driver knows, such as 13000; 0 without a driver."""

def use_general_forms(only: bool) -> None:
    """Launch only the forms for arrays of any size and rows of any length, which tests want; or again the best ones."""

def __getattr__(name: str) -> Callable[..., None]:
    """NAME_f32, _f64, _f16 or _bf16: takes addresses in the order of `csrc/arguments.h`, sizes, device and stream."""
