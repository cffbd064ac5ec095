"""Evaluate tiny.py's model under torchrun: `count.py FOLDER OUTPUT` saves what process 0 found, and its CSV file."""

import sys
from pathlib import Path

import torch

from segcore import distributed, load_experiment
from segcore.data.layouts import open_dataset
from segcore.evaluation.evaluate import evaluate
from segcore.evaluation.predictor import Predictor
from segcore.reporting.tables import write_per_image

exp = load_experiment(f"{Path(__file__).with_name('tiny.py')}:tiny").with_overrides([f"data.root={sys.argv[1]}"])
torch.manual_seed(0)
model = exp.model.build()
with distributed.process_group(60):
    results = evaluate(Predictor.of(model, exp), open_dataset(exp.data, "val"), calibration=True)
    assert distributed.world_size() == int(sys.argv[2].rsplit("_", 1)[1])
    if distributed.rank() == 0:
        found = {"images": results.images, "matrix": results.confusion["final"]}
        torch.save(found | {"calibration": results.calibration.to_json()}, sys.argv[2])
        write_per_image(Path(f"{sys.argv[2]}.csv"), results)
distributed.hard_exit(0)
