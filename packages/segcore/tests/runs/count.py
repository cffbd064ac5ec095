"""Evaluate tiny.py's model under torchrun: `count.py FOLDER OUTPUT` saves the confusion matrix of process 0."""

import sys
from pathlib import Path

import torch

from segcore import distributed, load_experiment
from segcore.data.layouts import open_dataset
from segcore.evaluation.evaluate import evaluate
from segcore.evaluation.predictor import Predictor

exp = load_experiment(f"{Path(__file__).with_name('tiny.py')}:tiny").with_overrides([f"data.root={sys.argv[1]}"])
torch.manual_seed(0)
model = exp.model.build()
with distributed.process_group(60):
    results = evaluate(Predictor.of(model, exp), open_dataset(exp.data, "val"))
    assert distributed.world_size() == int(sys.argv[2].rsplit("_", 1)[1])
    if distributed.rank() == 0:
        torch.save({"images": results.images, "matrix": results.confusion["final"]}, sys.argv[2])
distributed.hard_exit(0)
