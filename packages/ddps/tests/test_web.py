"""The page in the browser, with a model that shows all of it: steps, uncertainty and a start mask drawn by hand."""

import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import segcore
from segcore.cli.web import Web
from segcore.demo import toy
from segcore.evaluation.predictor import Predictor
from segcore.web import answers

NAME = "ddps_segformer_b0_toy"


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("web") / "model.pth"
    torch.save(segcore.load_experiment(NAME).model.build().state_dict(), path)
    return path


@pytest.fixture(scope="module")
def seg(weights):
    return segcore.load_model(NAME, weights, device="cpu")


@pytest.fixture(scope="module")
def photo():
    return np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)


def test_the_answer_is_that_of_the_model(seg, photo):
    found = answers.answer(seg, photo)
    np.testing.assert_array_equal(found.result.classes, seg(photo).classes)
    assert list(found.steps) == list(seg.steps(photo))
    assert found.uncertainty is None
    assert "96 x 64 pixels, 3 denoising steps" in found.report


@pytest.mark.parametrize("settings", [{"ensemble_steps": True}, {"early_exit_threshold": 0.5}])
def test_the_answer_is_the_configured_one(seg, photo, settings):
    exp = seg.experiment
    exp = dataclasses.replace(exp, evaluate=dataclasses.replace(exp.evaluate, **settings))
    seg = dataclasses.replace(seg, experiment=exp, predictor=Predictor.of(seg.model, exp))
    found = answers.answer(seg, photo)
    np.testing.assert_array_equal(found.result.classes, seg(photo).classes)
    assert [*found.steps][3:] == ["answer"]
    np.testing.assert_array_equal(answers.paint(found), answers.paint(found, step=3))
    steps = seg(photo).steps_used or 3
    assert f"96 x 64 pixels, {steps} denoising steps" in found.report


def test_the_mean_over_the_steps_is_that_of_the_configured_ones(seg, photo):
    exp = seg.experiment
    exp = dataclasses.replace(exp, evaluate=dataclasses.replace(exp.evaluate, ensemble_steps=True))
    seg = dataclasses.replace(seg, experiment=exp, predictor=Predictor.of(seg.model, exp))
    np.testing.assert_array_equal(answers.answer(seg, photo, steps=5).result.classes, seg(photo).classes)


def test_seed_number_of_steps_and_uncertainty_are_those_asked_for(seg, photo):
    configured = answers.configured_steps(seg)
    found = answers.answer(seg, photo, seed=3, steps=configured + 3, uncertainty=True)
    assert len(found.steps) > len(answers.answer(seg, photo).steps)
    assert (found.result.classes != answers.answer(seg, photo, steps=configured + 3).result.classes).any()
    assert found.uncertainty.shape == (64, 96)
    assert answers.configured_steps(seg) == configured


def test_only_this_machine_is_shown_photos_of_the_data_set(tmp_path):
    exp = segcore.load_experiment(NAME)
    exp = dataclasses.replace(exp, data=dataclasses.replace(exp.data, root=tmp_path / "data"))
    toy.generate(tmp_path / "data", train=1, val=1)
    for options, drawn in (({}, False), ({"host": "0.0.0.0"}, True), ({"share": True}, True)):
        folder = tmp_path / "drawn" if drawn else tmp_path / "data"
        photos = Web(exp, checkpoint="x", **options)._examples(tmp_path / "drawn")
        assert all(folder in photo.parents for photo in photos), options


def test_a_large_photo_is_shrunk(seg, photo):
    found = answers.answer(seg, photo, max_side=48)
    assert found.result.classes.shape == (32, 48)
    assert "48 x 32 pixels, shrunk from 96 x 64" in found.report


def test_only_chosen_classes_are_painted_and_the_legend_counts(seg, photo):
    found = answers.answer(seg, photo)
    names, colors = seg.mask_classes
    most = int(np.bincount(found.result.mask.ravel()).argmax())
    painted = answers.paint(found, opacity=1, only=[names[most]])
    chosen = found.result.mask == most
    assert (painted[chosen] == colors[most]).all()
    np.testing.assert_array_equal(painted[~chosen], photo[~chosen])
    first = re.search(r"</span>(.*?) <small>(.*?)%", answers.legend(found, 0 if len(found.steps) == 1 else None))
    assert first.groups() == (names[most], f"{chosen.mean() * 100:.1f}")


def test_a_stroke_becomes_the_class_of_its_color_and_the_rest_stays(seg, photo):
    found = answers.answer(seg, photo)
    _, colors = seg.mask_classes
    layer = np.zeros((128, 192, 4), np.uint8)  # the editor's own size
    layer[:64, :, :3], layer[:64, :, 3] = colors[11] + 1, 255
    start = answers.drawn_start(layer, found)
    first = int(seg.experiment.data.add_background_class)
    assert (start[:32] == 11 + first).all()
    np.testing.assert_array_equal(start[32:], found.result.classes[32:])
    again = answers.answer(seg, photo, start=start)
    np.testing.assert_array_equal(next(iter(again.steps.values())), start)
    assert "3 denoising steps" in again.report


@pytest.mark.parametrize("steps", [None, 5])
def test_the_files_hold_the_answer(seg, photo, tmp_path, steps):
    found = answers.answer(seg, photo, steps=steps)
    mask, overlay, probabilities = answers.files(found, tmp_path)
    np.testing.assert_array_equal(np.array(Image.open(mask)), found.result.mask)
    assert Image.open(overlay).size == (96, 64)
    stored = np.load(probabilities)["probabilities"]
    best, own = stored.max(0), np.take_along_axis(stored, found.result.classes[None].astype(int), 0)[0]
    np.testing.assert_allclose(own, best, atol=2e-3)  # float16 has ties
    started = answers.answer(seg, photo, start=found.result.classes.astype(np.int64))
    *_, probabilities = answers.files(started, tmp_path / "started")
    stored = np.load(probabilities)["probabilities"]
    own = np.take_along_axis(stored, started.result.classes[None].astype(int), 0)[0]
    np.testing.assert_allclose(own, stored.max(0), atol=2e-3)
    assert (started.result.classes != found.result.classes).any(), "another run would not be told apart"


def test_a_file_that_claims_many_pixels_is_refused_in_one_line(seg, tmp_path):
    gradio = pytest.importorskip("gradio")
    from segcore.web.page import _Actions

    bomb = tmp_path / "bomb.png"
    Image.new("1", (40_000, 40_000)).save(bomb)
    with pytest.raises(gradio.Error, match=r"^'?bomb\.png: .*data\.max_pixels"):
        _Actions(seg, 64).segment(str(bomb), 1, 0, False, 0.5, [])


@pytest.mark.slow
def test_in_the_browser(weights, photo, tmp_path, browser):
    pytest.importorskip("gradio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    Image.fromarray(photo).save(tmp_path / "photo.png")
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    command = [sys.executable, "-m", "ddps_seg", "web", NAME, str(weights), "--port", str(port), "--device", "cpu"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=tmp_path,
            env={**os.environ, "TMPDIR": str(temporary)},
        )  # fmt: skip
    try:
        address = process.stdout.readline().split()[0]
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        asked, errors = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
        page.goto(address)

        page.locator("input[type=file]").first.set_input_files(tmp_path / "photo.png")
        page.get_by_text("96 x 64 pixels, 3 denoising steps").wait_for()
        image = page.locator("#answer img")
        seen = [image.get_attribute("src")]

        def changes(act) -> None:
            act()
            page.wait_for_function("([e, before]) => e.src !== before", arg=[image.element_handle(), seen[-1]])
            seen.append(image.get_attribute("src"))

        step = page.get_by_label("number input for After this denoising step")
        changes(lambda: (step.fill("1"), step.press("Enter")))
        page.get_by_text("timestep 0").wait_for()
        opacity = page.get_by_label("number input for Opacity")
        changes(lambda: (opacity.fill("1"), opacity.press("Enter")))

        page.get_by_role("button", name="Prepare files").click()
        with page.expect_download() as download:
            page.locator("a[download]").filter(has_text=re.compile("MB|KB|B")).first.click()
        assert Image.open(download.value.path()).size == (96, 64)

        page.get_by_text("Correct the classes by hand").click()
        canvas = page.locator("canvas").last
        canvas.scroll_into_view_if_needed()
        page.wait_for_timeout(1000)  # the editor shows the photo some time after its canvas
        box = canvas.bounding_box()
        page.mouse.move(box["x"] + box["width"] * 0.45, box["y"] + box["height"] / 2)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * 0.55, box["y"] + box["height"] / 2, steps=5)
        page.mouse.up()
        changes(page.get_by_role("button", name="Start from here").click)

        page.set_viewport_size({"width": 390, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
        assert errors == []
        assert list(temporary.rglob("photo.png"))
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert not list(temporary.rglob("photo.png")), (tmp_path / "log").read_text()
