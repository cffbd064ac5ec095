"""A model in the browser: a photo in, classes in color out, in the browser."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from segcore.errors import UserError
from segcore.inference import LoadedModel
from segcore.web import answers
from segcore.web.answers import Answer

LIFETIME = 600
"""Seconds after which uploads and results are deleted."""
STYLE = """
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: 0; padding: 0; list-style: none; }
.legend li { margin: 0; }
.swatch { display: inline-block; width: 1em; height: 1em; margin-right: .4em; border-radius: 2px; }
"""
PRIVACY = f"Photos stay on the machine that runs this page, which deletes them within {LIFETIME // 60 + 1} minutes."
SHARED = "This page has a public address: photos pass through a server of gradio's."
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
"""The browser's own: gradio's would be fetched from elsewhere."""
IMAGE: Any = {"buttons": ["download", "fullscreen"]}
"""Without gradio's button for sharing, which would send the image elsewhere."""
UPLOAD: Any = {"type": "filepath", "image_mode": None}
"""The file as it is: it is read as `predict` reads files, with its limit of pixels, which gradio does not have."""
PRIVATE: Any = {"api_visibility": "private"}
QUICK: Any = PRIVATE | {"show_progress": "hidden"}
MODEL: Any = PRIVATE | {"concurrency_id": "model", "concurrency_limit": 1}
"""For what runs the model, whose number of steps is changed meanwhile: one after the other."""


def build(
    seg: LoadedModel, *, examples: Sequence[str | Path] = (), max_side: int = 1024, share: bool = False
) -> gr.Blocks:
    """Return the page for a model of 8-bit RGB images; `launch` shows it.

    Args:
        examples: photos that are offered to begin with.
        max_side: a photo with a longer side, in pixels, is shrunk first.
        share: the page will have a public address, and says so.

    Raises UserError for models of other images.
    """
    data = seg.experiment.data
    if (data.channels, data.bit_depth) != (3, 8):
        raise UserError(f"the page takes photos, but the model {data.bit_depth}-bit images of {data.channels} channels")
    act, (names, colors), stepwise = _Actions(seg, max_side), seg.mask_classes, answers.is_stepwise(seg)
    with gr.Blocks(title=seg.experiment.name, analytics_enabled=False, delete_cache=(60, LIFETIME)) as page:
        found = gr.State(None, time_to_live=LIFETIME)
        gr.Markdown(
            f"# {seg.experiment.name}\nSegments a photo into {len(names)} classes. {SHARED if share else PRIVACY}"
        )
        with gr.Row():
            with gr.Column():
                photo = gr.Image(label="Photo", sources=["upload", "webcam", "clipboard"], **UPLOAD, **IMAGE)
                if examples:
                    gr.Examples([[str(path)] for path in examples], photo, label="Examples", **PRIVATE)
                with gr.Group(visible=stepwise):
                    steps, fixed = answers.configured_steps(seg), seg.experiment.evaluate.ensemble_steps
                    count = gr.Slider(
                        1, max(steps, 20), steps, step=1, label="Number of denoising steps", visible=not fixed
                    )
                    seed = gr.Number(seg.experiment.seed, precision=0, minimum=0, label="Seed of the noise")
                    unsure = gr.Checkbox(False, label="Uncertainty, from several more runs")
                run = gr.Button("Segment", variant="primary")
            with gr.Column():
                painted = gr.Image(label="Classes", format="png", interactive=False, elem_id="answer", **IMAGE)
                step = gr.Slider(1, 2, 1, step=1, label="After this denoising step", visible=False)
                opacity = gr.Slider(0, 1, 0.5, step=0.05, label="Opacity")
                only = gr.Dropdown(list(names), multiselect=True, label="Paint only these classes")
                legend = gr.HTML()
                gray = gr.Image(label="Uncertainty: light is unsure", interactive=False, visible=False, **IMAGE)
                report = gr.Markdown()
                prepare = gr.Button("Prepare files")
                files = gr.File(label="Files", file_count="multiple", interactive=False, visible=False)
        how, shown = [count, seed, unsure, opacity, only], [found, painted, step, legend, gray, report, files]
        gr.on([photo.change, run.click], act.segment, [photo, *how], shown, show_progress_on=painted, **MODEL)
        changed = [step.change, opacity.change, only.change]
        gr.on(changed, act.repaint, [found, step, opacity, only], [painted, legend], **QUICK)
        prepare.click(act.files, found, files, **MODEL)
        if answers.starts_from_masks(seg):
            with gr.Accordion("Correct the classes by hand, and let the model go on from there", open=False):
                brush = gr.Brush(colors=["#{:02x}{:02x}{:02x}".format(*color) for color in colors], color_mode="fixed")
                editor = gr.ImageEditor(label="Start mask", brush=brush, transforms=(), sources=())
                again = gr.Button("Start from here")
            found.change(lambda answer: answer and answers.paint(answer), found, editor, **QUICK)
            again.click(act.go_on, [editor, found, *how], shown, show_progress_on=painted, **MODEL)
    return page


@dataclass(frozen=True)
class _Actions:
    """What the page's buttons and sliders do: from their values to those of the outputs."""

    seg: LoadedModel
    max_side: int

    def segment(
        self, photo: np.ndarray | str | None, count: int, seed: int, unsure: bool, opacity: float, only: Sequence[str],
        start: np.ndarray | None = None,
    ) -> list[Any]:  # fmt: skip
        """Return found, painted, step, legend, gray, report and files of a photo."""
        hidden = gr.update(visible=False)
        if photo is None:
            return [None, None, hidden, "", hidden, "", hidden]
        try:
            found = answers.answer(
                self.seg, photo, max_side=self.max_side, seed=int(seed or 0), steps=int(count), uncertainty=unsure,
                start=start,
            )  # fmt: skip
        except ValueError as error:
            text = str(error) if isinstance(photo, np.ndarray) else str(error).replace(photo, Path(photo).name)
            raise gr.Error(text, print_exception=False) from None
        last = len(found.steps)
        step = gr.update(visible=True, minimum=1, maximum=last, value=last) if last > 1 else hidden
        gray = hidden if found.uncertainty is None else gr.update(value=answers.gray(found.uncertainty), visible=True)
        painted, legend = self.repaint(found, last, opacity, only)
        return [found, painted, step, legend, gray, found.report, hidden]

    def repaint(self, found: Answer | None, step: int, opacity: float, only: Sequence[str]) -> list[Any]:
        """Return painted and legend."""
        if found is None:
            return [None, ""]
        at = min(int(step), len(found.steps)) - 1 if found.steps else None
        return [answers.paint(found, step=at, opacity=opacity, only=only), answers.legend(found, at)]

    def go_on(
        self,
        editor: Any,
        found: Answer | None,
        count: int,
        seed: int,
        unsure: bool,
        opacity: float,
        only: Sequence[str],
    ) -> list[Any]:
        """Return what `segment` does, for a run that starts from what was drawn."""
        if found is None or not editor or not editor["layers"]:
            raise gr.Error("segment a photo, then paint over it", print_exception=False)
        start = answers.drawn_start(editor["layers"][0], found)
        return self.segment(found.result.image, count, seed, unsure, opacity, only, start)

    def files(self, found: Answer | None) -> Iterator[Any]:
        """Yield the files once; the page keeps copies, for a while."""
        if found is None:
            raise gr.Error("segment a photo first", print_exception=False)
        with tempfile.TemporaryDirectory() as folder:
            yield gr.update(value=list(map(str, answers.files(found, Path(folder)))), visible=True)


def launch(
    page: gr.Blocks,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    max_upload: int = 20_000_000,
    on_ready: Callable[[str], None] = print,
) -> None:
    """Show the page until the process ends; `on_ready` is called with its address.

    Args:
        port: None is the first free one from 7860 on.
        share: also at a public address of gradio's.
        max_upload: size limit of an uploaded file in bytes.

    Raises OSError when it cannot listen there.
    """
    _, local, public = page.launch(
        server_name=host, server_port=port, share=share, max_file_size=max_upload, prevent_thread_lock=True,
        theme=gr.themes.Default(**FONTS), css=STYLE, footer_links=[], ssr_mode=False, run_history=False, quiet=True,
        enable_monitoring=False,
    )  # fmt: skip
    on_ready(public or local)
    try:
        threading.Event().wait()
    finally:
        page.close(verbose=False)
