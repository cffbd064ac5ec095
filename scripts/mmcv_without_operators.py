"""Let MMSegmentation import beside an mmcv without compiled operators, such as mmcv-lite: run it with that Python.

MMSegmentation's heads import operators that few models use, and none of ours. This writes `mmcv/_ext.py`, which has
every operator by name; calling one raises NotImplementedError. An mmcv with operators stays as it is.
"""

import importlib.util
from pathlib import Path

STAND_IN = '''\
"""Takes the place of mmcv's compiled operators, which this environment does not have."""


def __getattr__(name):
    def operator(*args, **kwargs):
        if name in ("get_compiler_version", "get_compiling_cuda_version"):  # asked for every log
            return "none"
        raise NotImplementedError(f"{name}: this mmcv has no compiled operators")

    return operator
'''

spec = importlib.util.find_spec("mmcv")
if spec is None or not spec.submodule_search_locations:
    raise SystemExit("mmcv is not installed for this Python")
folder = Path(spec.submodule_search_locations[0])
if any(folder.glob("_ext*.so")) or any(folder.glob("_ext*.pyd")):
    print(f"{folder}: has compiled operators, nothing to do")
else:
    (folder / "_ext.py").write_text(STAND_IN)
    print(f"{folder / '_ext.py'}: written")
