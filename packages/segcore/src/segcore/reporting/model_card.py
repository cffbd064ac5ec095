"""The card of a shared model, README.md: what the Hugging Face hub shows, with all texts of users escaped."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from segcore.config.schema import Experiment
from segcore.reporting.page import percent
from segcore.reporting.run_record import Evaluation

TEXT = """---
{header}
---

# {name}

A model for semantic segmentation: configuration {name} of {package}, {parameters:.1f} M parameters, {count} classes.

```bash
pip install {package}
```

```python
import segcore

seg = segcore.load_model("hub:{repo}")
result = seg("photo.jpg")
result.overlay(legend=True).save("overlay.png")
```

`model.safetensors` has the weights and `config.json` all settings. Nothing in them is executed.

## Classes and figures

{figures}

{table}
{images}
## License

{license}
"""


def model_card(
    exp: Experiment,
    repo: str,
    *,
    package: str,
    parameters: int,
    classes: Sequence[str],
    evaluation: Evaluation | None,
    images: Sequence[str],
    license: str,
) -> str:
    """Return the card, Markdown behind a header in YAML.

    `evaluation` is the stored one of the weights, or None; `images` are paths in the repository; `package` is the
    distribution of the method; `repo` and `license` are plain words.
    """
    header: dict[str, Any] = {
        "license": license,
        "library_name": "segcore",
        "pipeline_tag": "image-segmentation",
        "tags": ["semantic-segmentation", package],
    }
    figures, column = "No evaluation of these weights is stored.", [""] * len(classes)
    if evaluation is not None:
        final, data = evaluation.final, {"folder": "own data"}.get(exp.data.dataset, exp.data.dataset)
        metrics = {"mIoU": final.miou, "aAcc": final.aacc, "mAcc": final.macc}
        known = {key: round(100 * value, 2) for key, value in metrics.items() if value is not None}
        header["model-index"] = [{
            "name": exp.name,
            "results": [{
                "task": {"type": "image-segmentation"},
                "dataset": {"type": data, "name": data},
                "metrics": [{"type": "mean_iou", "name": key, "value": known[key]} for key in known if key == "mIoU"],
            }],
        }]  # fmt: skip
        figures = ", ".join(f"{key} {value:.2f} %" for key, value in known.items())
        figures += f", measured by segcore on {evaluation.images} validation images of {escaped(data)}."
        column = [percent(value) for value in final.iou]
    rows = [f"| {number} | {escaped(name)} | {iou} |" for number, (name, iou) in
            enumerate(zip(classes, column, strict=True))]  # fmt: skip
    pictures = "".join(f"\n![An image with the predicted classes in color]({path})\n" for path in images)
    return TEXT.format(
        # JSON is YAML, except for escaped pairs of surrogates
        header="\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in header.items()),
        name=escaped(exp.name),
        repo=repo,
        package=package,
        parameters=parameters / 1e6,
        count=len(classes),
        figures=figures,
        table="\n".join(["| value | class | IoU in % |", "|---|---|---|", *rows]),
        images=f"\n## Images\n{pictures}" if images else "",
        license=f"As stated by the author: {license}.",
    )


def escaped(text: str) -> str:
    """Return a text that Markdown and HTML show as it is, in one line: all marks become entities."""
    return _MARKS.sub(lambda mark: f"&#{ord(mark[0])};" if mark[0].isprintable() else " ", text)


_MARKS = re.compile(r"[^\w -]|(?<![^\W_])_|_(?![^\W_])")
"""Characters of no word; `_` only at the ends of words, as it marks nothing inside."""
