"""What a build may remove and replace."""

from pathlib import Path

import pytest

from playground.tinycoco.build import OWN, clear, publish


def test_only_what_a_build_left_is_removed(tmp_path: Path) -> None:
    for folder in (tmp_path / "new", tmp_path):
        folder.mkdir(exist_ok=True)
    clear(tmp_path / "new")
    (tmp_path / "new/trained.bin").touch()
    clear(tmp_path / "new")
    assert [path.name for path in (tmp_path / "new").iterdir()] == [OWN]
    (thesis := tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(FileExistsError, match="expected a new folder or a build's, found other files; give another"):
        clear(tmp_path)
    assert thesis.read_text() == "mine"


def test_what_a_build_does_not_have_stays(tmp_path: Path) -> None:
    for name, content in (("new/weights/clip/a", "new"), ("out/weights/clip/a", "old"), ("out/weights/mine", "mine")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    publish(tmp_path / "new", tmp_path / "out")
    assert (tmp_path / "out/weights/clip/a").read_text() == "new"
    assert (tmp_path / "out/weights/mine").read_text() == "mine"
