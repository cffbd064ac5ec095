"""The printed tables, character by character, and the JSON results."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from segcore.errors import UserError
from segcore.evaluation.evaluate import ImageFigures, Results
from segcore.evaluation.metrics import ConfusionMatrix
from segcore.reporting.tables import per_class, summary, write_json, write_per_image


def results(**predictions):
    """Results of four labeled pixels of the classes sky, road, road, car; `van` never occurs."""
    label = torch.tensor([0, 1, 1, 2])
    entries = {name: ConfusionMatrix(4).update(torch.tensor(p), label).compute() for name, p in predictions.items()}
    return Results(("sky", "road", "car", "van"), entries, 1)


@pytest.mark.parametrize(
    ("name", "reduce_zero"),
    [("city19_ignore", False), ("ade150_reduce_zero", True), ("absent6", False), ("only_one_present", False)],
)
def test_published_text(golden, name, reduce_zero):
    case = golden("eval/golden/metrics.npz")
    label, prediction = (torch.from_numpy(case[f"{name}/{key}"]).int() for key in ("label", "pred"))
    if reduce_zero:
        label = torch.where((label == 0) | (label == 255), 255, label - 1)
    num_classes = int(case[f"{name}/num_classes"])
    metrics = ConfusionMatrix(num_classes).update(prediction, label).compute()
    found = Results(tuple(f"c{i}" for i in range(num_classes)), {"final": metrics}, len(label))
    assert f"{per_class(found)}\n{summary(found)}" == str(case[f"{name}/table_text"]).strip()


def test_one_entry():
    found = results(final=[0, 1, 0, 2])
    assert summary(found) == (
        "Summary:\n\n"
        "+------+-------+-------+\n"
        "| aAcc |  mIoU |  mAcc |\n"
        "+------+-------+-------+\n"
        "| 75.0 | 66.67 | 83.33 |\n"
        "+------+-------+-------+"
    )
    assert per_class(found) == (
        "per class results:\n\n"
        "+-------+-------+-------+\n"
        "| Class |  IoU  |  Acc  |\n"
        "+-------+-------+-------+\n"
        "|  sky  |  50.0 | 100.0 |\n"
        "|  road |  50.0 |  50.0 |\n"
        "|  car  | 100.0 | 100.0 |\n"
        "|  van  |  nan  |  nan  |\n"
        "+-------+-------+-------+"
    )


def test_a_column_per_step_entry():
    found = results(**{"1": [0, 1, 0, 2], "10": [0, 1, 1, 2]})
    text = summary(found)
    assert "| Steps |   1   |   10  |" in text
    assert "|  mIoU | 66.67 | 100.0 |" in text
    assert text.startswith("By entry:\n")
    assert "Summary (10):" in text
    text = summary(replace(found, configured="1", by="steps"))
    assert text.startswith("By number of denoising steps:\n")
    assert "66.67" in text.partition("Summary (1 step):")[2]
    text = summary(replace(found, configured="3", by="timestep"))
    assert text.startswith("By timestep:\n")
    assert "Summary (timestep 10; the model's configured timestep 3 not evaluated):" in text
    assert text.splitlines()[-4:-1] == [
        "|  aAcc |  mIoU |  mAcc |",
        "+-------+-------+-------+",
        "| 100.0 | 100.0 | 100.0 |",
    ]
    lines = per_class(found).splitlines()
    assert [cell.strip() for cell in lines[3].split("|")[1:-1]] == ["Class", "IoU 1", "IoU 10", "Acc 1", "Acc 10"]
    assert [cell.strip() for cell in lines[6].split("|")[1:-1]] == ["road", "50.0", "100.0", "50.0", "100.0"]


def test_further_metrics():
    found = results(final=[0, 1, 0, 2])
    header = summary(found, ("mIoU", "mDice", "mFscore")).splitlines()[3]
    names = ["aAcc", "mIoU", "mAcc", "mDice", "mFscore", "mPrecision", "mRecall"]
    assert [cell.strip() for cell in header.split("|")[1:-1]] == names
    assert "| Class | Fscore | Precision | Recall |" in per_class(found, ("mFscore",))


def test_tables_are_ascii_and_aligned():
    found = results(**{"1": [0, 1, 0, 2], "3": [3, 3, 3, 3]})
    for text in (summary(found), per_class(found, ("mDice", "mFscore"))):
        assert text.isascii()
        table = [line for line in text.splitlines() if line.startswith(("|", "+"))]
        assert all(line.endswith(line[0]) for line in table)
    assert len({len(line) for line in per_class(found).splitlines()[2:]}) == 1


def test_json_keeps_every_digit_and_marks_nan(tmp_path):
    found = results(final=[0, 1, 0, 2])
    path = tmp_path / "results.json"
    write_json(path, found, {"config": "toy", "seed": 3})
    stored = json.loads(path.read_text())
    assert (stored["config"], stored["seed"], stored["images"]) == ("toy", 3, 1)
    assert stored["entries"]["final"]["mIoU"] == found.final["mIoU"] == pytest.approx(2 / 3, abs=1e-15)
    assert math.isnan(found.final["IoU"][3])
    assert stored["entries"]["final"]["IoU"][3] is None
    assert stored["classes"] == ["sky", "road", "car", "van"]


def test_json_is_written_completely_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_json(path, results(final=[0, 1, 0, 2]))
    before = path.read_text()

    def full(self, target):
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(UserError, match=r"results\.json: cannot be written \(no space"):
        write_json(path, results(final=[0, 0, 0, 0]))
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def test_json_has_the_counts_on_lines(tmp_path):
    """K rows of labels and K columns of predictions; of a single class both of its values."""
    matrix = ConfusionMatrix(2).update(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]))
    found = Results(("[1, 2]", "b"), {"final": matrix.compute()}, 1, {"final": matrix.matrix})
    write_json(tmp_path / "two.json", found)
    text = (tmp_path / "two.json").read_text()
    assert json.loads(text)["confusion"] == {"final": [[1, 1], [0, 1]]}
    assert "[ 1, 1 ]" in text
    assert '"[1, 2]"' in text
    one = ConfusionMatrix(1).update(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]))
    write_json(tmp_path / "one.json", Results(("a",), {"final": one.compute()}, 1, {"final": one.matrix}))
    assert json.loads((tmp_path / "one.json").read_text())["confusion"] == {"final": [[1, 1], [0, 1]]}
    write_json(tmp_path / "many.json", replace(found, classes=("a",) * 1001))
    assert "confusion" not in json.loads((tmp_path / "many.json").read_text())


def test_published_figures_stand_beside_the_steps():
    found = replace(results(**{"0": [0, 1, 0, 2], "19": [0, 1, 1, 2]}), by="timestep", configured="19")
    text = summary(found, published={"timestep 0": 49.35, "timestep 19": 49.66, "multi scale": 50.0})
    assert "|      mIoU      | 66.67 | 100.0 |\n" in text
    assert "| published mIoU | 49.35 | 49.66 |\n" in text
    assert "|  mIoU 0,19  | published mIoU 0,19 |\n" in text
    assert "| 66.67,100.0 |     49.35,49.66     |\n" in text
    assert "published" not in summary(found, published={"single scale": 49.0})


def test_a_table_of_images(tmp_path):
    iou = np.array([0.5, math.nan], np.float32)
    row = ImageFigures(3, 'a/"b"', 8, 4, 0, math.nan, math.nan, iou, 2.5)
    write_per_image(tmp_path / "images.csv", Results(("x", "y, z"), {}, 1, steps_taken=2.5, per_image=(row,)))
    assert list(csv.reader((tmp_path / "images.csv").open())) == [
        ["name", "width", "height", "pixels", "mIoU", "aAcc", "steps", "IoU x", "IoU y, z"],
        ['a/"b"', "8", "4", "0", "", "", "2.5", "0.5", ""],
    ]
