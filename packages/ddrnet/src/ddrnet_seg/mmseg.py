"""The models of this package in MMSegmentation: `custom_imports = dict(imports=["ddrnet_seg.mmseg"])` registers them.

See `segcore.openmmlab` for `SegcoreModel`.
"""

from segcore.openmmlab import SegcoreModel as SegcoreModel
from segcore.openmmlab import SegcoreOptimizer as SegcoreOptimizer
