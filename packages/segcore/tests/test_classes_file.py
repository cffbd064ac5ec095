"""The list of classes beside masks."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

from segcore.errors import UserError
from segcore.reporting.classes_file import write_classes

PALETTE = np.array([[128, 64, 128], [70, 130, 180]], np.uint8)


def test_values_names_and_colors_are_listed(tmp_path, capsys):
    path = tmp_path / "new" / "classes.json"
    write_classes(path, ("road", "sky"), PALETTE, ignored=255)
    assert json.loads(path.read_text()) == [
        {"value": 0, "name": "road", "color": [128, 64, 128]},
        {"value": 1, "name": "sky", "color": [70, 130, 180]},
        {"value": 255, "name": "ignored", "color": [0, 0, 0]},
    ]
    assert capsys.readouterr().err == ""


def test_an_equal_list_is_not_touched_and_another_one_is_replaced_with_a_note(tmp_path, capsys):
    path = tmp_path / "classes.json"
    write_classes(path, ("road", "sky"), PALETTE)
    os.utime(path, (1, 1))
    write_classes(path, ("road", "sky"), PALETTE)
    assert path.stat().st_mtime == 1
    assert capsys.readouterr().err == ""
    write_classes(path, ("field", "water"), PALETTE)
    assert [row["name"] for row in json.loads(path.read_text())] == ["field", "water"]
    assert "classes.json listed other classes" in capsys.readouterr().err


@pytest.mark.parametrize("content", ['{"a": 1}', "[1, 2]", '[{"value": 0}]', "", "\x00", "[" * 100_000])
def test_a_file_of_someone_else_is_kept(tmp_path, content):
    path = tmp_path / "classes.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"classes\.json: is no list of classes and would be overwritten"):
        write_classes(path, ("road", "sky"), PALETTE)
    assert path.read_text() == content


def test_a_folder_in_its_place_is_refused(tmp_path):
    (tmp_path / "classes.json").mkdir()
    with pytest.raises(UserError, match="not a regular file"):
        write_classes(tmp_path / "classes.json", ("road", "sky"), PALETTE)


def test_a_file_that_cannot_be_read_is_kept(tmp_path, monkeypatch):
    path = tmp_path / "classes.json"
    path.write_text("mine")

    def fails(path):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fails)
        with pytest.raises(UserError, match=r"classes\.json: cannot be read \(Permission denied\); choose another"):
            write_classes(path, ("road", "sky"), PALETTE)
    assert path.read_text() == "mine"
