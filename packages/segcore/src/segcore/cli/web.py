"""`web`."""

from __future__ import annotations

import contextlib
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from segcore.cli.common import PROVIDER, Command, load
from segcore.config.options import Flag
from segcore.errors import UserError

EXAMPLES = 4
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Web(Command):
    """Try a model in the browser: a photo in, classes in color out (extra `web`)."""

    checkpoint: str = field(kw_only=True)
    """A run folder (its best checkpoint), a checkpoint folder, a weights file, `official` (published weights) or
    hub:USER/REPO."""
    provider: str | None = field(default=None, metadata=PROVIDER)
    """What runs an exported model: openvino, or one of ONNX Runtime's that is installed: cpu (the default), cuda,
    tensorrt, coreml …"""
    port: int | None = None
    """Port of the page; by default the first free one from 7860 on."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 lets other machines of the network in."""
    share: Flag = False
    """Also show the page at a public address for a week, through a server of gradio's: photos then pass through it."""
    max_side: int = 1024
    """A photo with a longer side, in pixels, is shrunk first."""
    max_upload: int = 20
    """Size limit of an uploaded file in MB."""

    def run(self, package: str | None) -> None:
        for name, value in (("max-side", self.max_side), ("max-upload", self.max_upload)):
            if value < 1:
                raise UserError(f"--{name} {value}: give at least 1")
        signal.signal(signal.SIGTERM, _interrupt)
        # Nothing is sent anywhere but by --share, whatever other settings of gradio's say.
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "GRADIO_SHARE": "False"}
        with TemporaryDirectory() as folder:
            os.environ["GRADIO_TEMP_DIR"] = folder  # uploads and results, gone with the page
            try:
                from segcore.web import page
            except ImportError:
                raise UserError("the page needs gradio; install segcore[web]") from None
            seg = load(self, self.checkpoint)
            made = page.build(seg, examples=self._examples(Path(folder)), max_side=self.max_side, share=self.share)
            try:
                page.launch(
                    made, host=self.host, port=self.port, share=self.share, max_upload=self.max_upload * 10**6,
                    on_ready=lambda address: print(f"{address} (Ctrl-C ends it)", flush=True),
                )  # fmt: skip
            except OSError:
                port = f"port {self.port}" if self.port else "any of the ports 7860 to 7959"
                raise UserError(f"cannot listen at {self.host}, {port}; choose another with --port, --host") from None

    def _examples(self, folder: Path) -> list[Path]:
        """Return photos of the validation set if it is there and nobody else sees the page, otherwise drawn scenes."""
        from segcore.data.layouts import open_dataset
        from segcore.demo import toy

        if not self.share and self.host in LOOPBACK:
            with contextlib.suppress(UserError):
                dataset = open_dataset(self.experiment.data, "val")
                return [sample.image for sample in dataset.samples[:EXAMPLES]]
        toy.generate(folder / "scenes", train=1, val=EXAMPLES)
        return sorted(folder.glob("scenes/leftImg8bit/val/*/*.png"))


def _interrupt(number: int, frame: object) -> None:
    """End the page as after a Ctrl-C, so that nothing of it stays behind."""
    raise KeyboardInterrupt(number)
