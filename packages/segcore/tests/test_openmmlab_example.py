"""The example script with MMSegmentation's tools and our commands, and the commands of the page about it.

Every `python` and `segcore` there is a process forked from one that has imported everything: imports take longer than
the commands themselves.
"""

import contextlib
import functools
import json
import logging
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch

from segcore.cli.main import main
from segcore.config.registry import load_experiment

mmseg = pytest.importorskip("mmseg", reason="MMSegmentation is not installed")
pytestmark = [pytest.mark.openmmlab, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]

from segcore.openmmlab import ONE  # noqa: E402

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "examples/mmsegmentation/exchange.sh"
PAGE = ROOT / "docs/coming_from_mmsegmentation.md"
DDP, DDPS, DDRNET, DGMN2, SEGFORMER, DEEPLAB = MODELS = re.search(r"models=\(\n(.*?)\)", SCRIPT.read_text(), re.S)[
    1
].split()

CLIENT = """#!{python} -IS
import os, socket, sys
name, *words = sys.argv
if os.path.basename(name) == "segcore":
    words = ["segcore", *words]
elif not words[0].endswith(".py"):  # -c or -
    os.execv("{python}", ["{python}", *words])
server = socket.socket(socket.AF_UNIX)
server.connect("{socket}")
socket.send_fds(server, ["\\0".join([os.getcwd(), *words]).encode()], [0, 1, 2])
sys.exit((server.recv(1) or b"\\1")[0])
"""


def serve(listener):
    """Run the commands that clients send, each in a process of its own, until the parent process has ended."""
    parent = os.getppid()
    listener.settimeout(10)
    while os.getppid() == parent:
        with contextlib.suppress(TimeoutError):
            client, _ = listener.accept()
            client.setblocking(True)
            words, files, *_ = socket.recv_fds(client, 1 << 16, 3)
            if not os.fork():
                client.send(bytes([answer(words.decode().split("\0"), files)]))
                os._exit(0)
            client.close()
            for file in files:
                os.close(file)


def answer(words, files):
    """Run a command in this process, which serves for nothing else, and return its exit status."""
    folder, *sys.argv = words
    os.chdir(folder)
    for number, file in enumerate(files):
        os.dup2(file, number)
    sys.stdin, sys.stdout, sys.stderr = (open(i, "w" if i else "r", closefd=False) for i in range(3))  # noqa: SIM115
    logging.getLogger().handlers.clear()  # pytest's
    try:
        if sys.argv[0] == "segcore":
            main(None, sys.argv[1:])
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
        return 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    """A function that runs lines of bash in a folder and returns what they printed; an error fails the test."""
    folder = tmp_path_factory.mktemp("bin")
    for name in ("python", "segcore"):
        (folder / name).write_text(CLIENT.format(python=sys.executable, socket=folder / "socket"))
        (folder / name).chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket"))
        listener.listen()
        server = os.fork()
        if not server:
            try:
                serve(listener)
            finally:
                os._exit(0)

    def run(lines, where):
        env = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
        words = ["bash", "-euo", "pipefail", "-c", lines]
        done = subprocess.run(words, cwd=where, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert done.returncode == 0, done.stdout[-5000:]
        return done.stdout

    yield run
    os.kill(server, signal.SIGKILL)
    os.waitpid(server, 0)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def exchanged(shell, work):
    """A function that runs the script for a model, once, and returns what it printed."""
    return functools.cache(lambda model: shell(f"{SCRIPT} data/toy work_dirs {model}", work))


ROW = re.compile(r"^\| +([a-z ]+?) +\| +([\d.]+|nan) +\| +([\d.]+|nan) +\|$", re.M)


@pytest.mark.parametrize("model", MODELS)
def test_each_side_evaluates_and_continues_the_checkpoints_of_the_other(model, exchanged, work):
    printed = exchanged(model)
    run = work / "work_dirs" / model
    theirs, ours = (
        torch.load(run / name, weights_only=True)["state_dict"] for name in ("theirs/iter_2.pth", "ours.pth")
    )
    assert theirs.keys() == ours.keys() == set(load_experiment(model).model.build().key_map().values())
    assert any(not torch.equal(tensor, ours[name]) for name, tensor in theirs.items())
    here = json.loads((run / "theirs/segcore.json").read_text())
    assert here["images"] == 4
    rows = [[float(iou), float(acc)] for _, iou, acc in ROW.findall(printed)]
    if model in (DDP, DDPS):  # whose noise is another, and whose tables here are by step
        assert len(rows) == 2 * 19
    else:
        there, here, trained_here, tested_there = np.array(rows).reshape(4, 19, 2)
        assert np.nanmax(there) > 1
        np.testing.assert_allclose(here, there, atol=0.011)  # of percentages with two decimals
        np.testing.assert_allclose(tested_there, trained_here, atol=0.011)


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), re.M | re.S)


def test_the_commands_of_the_page(shell, exchanged, work):
    """Those of the other line, of installing and of this very session apart."""
    exchanged(DDRNET)
    (work / "configs").symlink_to(Path(mmseg.__path__[0], ".mim/configs"))
    start, *after = (block for block in blocks("bash") if "pip install" not in block and "nox" not in block)
    assert start == "cd examples/mmsegmentation\n./exchange.sh data/toy work_dirs\n"
    other = "# 0.30" if ONE else "# 1.x"
    for block in after:
        lines = [line for line in block.splitlines() if other not in line]
        assert lines
        shell("\n".join(lines), work)
    (work / "deploy.py").write_text("".join(blocks("python deploy")))
    assert "(128, 256)" in shell("python deploy.py", work)


def test_what_the_page_installs_is_what_the_session_installs():
    session = (ROOT / "noxfile.py").read_text()
    installs = "".join(block for block in blocks("bash") if "pip install" in block)
    pinned = re.findall(r"[\w-]+==[\w.]+", installs)
    assert len(pinned) > 5
    assert [word for word in pinned if f'"{word}"' not in session] == []


def test_the_page_names_tests_that_exist():
    names = re.findall(r"`(test_\w+)`", PAGE.read_text())
    texts = [file.read_text() for file in Path(__file__).parent.glob("test_openmmlab*.py")]
    assert names
    assert [name for name in names if not any(f"def {name}(" in text for text in texts)] == []
