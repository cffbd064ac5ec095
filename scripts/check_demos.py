"""Check that the demos of the methods named, or of all, have reached their figures in runs/demo.

    python scripts/check_demos.py [METHOD …]

Ends with an AssertionError that says which figure was missed.
"""

import json
import sys
from pathlib import Path

FLOORS = {
    "ddp": ("ddp_resnet18_toy", 0.45),
    "ddps": ("ddps_segformer_b0_toy", 0.40),
    "ddrnet": ("ddrnet_23_slim_toy", 0.40),
    "dgmn2": ("setr_mla_dgmn2_nano_toy", 0.35),
}
"""The configuration of each method's demo, and the lowest mIoU, 0..1."""

for method in sys.argv[1:] or FLOORS:
    name, floor = FLOORS[method]
    figures = json.loads(Path("runs/demo", name, "figures.json").read_text())
    print(name, figures)
    assert figures["mIoU"] >= floor, f"the demo's mIoU is below {floor:.0%}"
    assert figures.get("uncertainty_AUROC", 1) >= 0.7, "the uncertainty does not separate wrong from right pixels"
    if "by_step" in figures:  # a prior on a base model
        first, *_, last = figures["by_step"].values()
        assert last >= first, "the prior's last step is below its first"
        assert figures["changed"] >= 0.01, "the prior changes less than 1 % of the base model's pixels"
        assert figures["refined"] > figures["corrupted"], "the prior does not improve corrupted maps"
    else:
        assert figures["mIoU"] >= 2 * figures["linear_mIoU"], "the demo is not twice as good as the linear classifier"
