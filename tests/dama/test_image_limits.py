"""Where images are read: the folders that links may lead into, and the sizes that are refused before decoding."""

import base64
import io
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from dama.cli import main
from dama.console import USER_ERROR
from dama.hardness.show import write_hardness_page
from dama.images import ImageError, load_image, probe_image, resolve_image
from llava.generation.answers import check_requests
from llava.generation.request import Request
from llava.mm_utils import expand2square, load_image_from_base64, process_images
from llava.train.arguments import parse_arguments
from llava.train.sft_data import read_rows
from tests.conftest import GOLDEN

pytestmark = pytest.mark.fast


@pytest.fixture()
def linked(tmp_path: Path) -> SimpleNamespace:
    """playground/data with coco/ linked from elsewhere, and a snapshot of a hub's cache, whose files are links."""
    coco, data, secret = tmp_path / "disk/coco", tmp_path / "playground/data", tmp_path / "secret"
    blobs, snapshot = tmp_path / "hub/blobs", tmp_path / "hub/snapshots/main"
    for folder in (coco / "train", data, secret, blobs, snapshot):
        folder.mkdir(parents=True)
    for number, path in enumerate((coco / "train/1.png", blobs / "a1b2", data / "own.png", secret / "key.png")):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path, "PNG")
    os.symlink(coco, data / "coco")
    os.symlink("../../blobs/a1b2", snapshot / "x.png")
    os.symlink(secret, data / "leak")
    os.symlink(secret / "key.png", coco / "train/hop.png")  # a link behind a link
    return SimpleNamespace(coco=coco, data=data, blobs=blobs, snapshot=snapshot, secret=secret)


# ---------------------------------------------------------------------------------------------------------------- links


def test_links_into_named_folders_are_followed(linked):
    photo = linked.coco / "train/1.png"
    assert resolve_image([linked.data, linked.coco], "coco/train/1.png") == photo
    assert resolve_image([linked.coco, linked.data], "coco/train/1.png") == photo
    assert resolve_image([str(linked.data), str(linked.coco.parent)], "coco/train/1.png") == photo
    assert resolve_image([linked.snapshot, linked.blobs], "x.png") == linked.blobs / "a1b2"
    assert resolve_image(linked.snapshot.parents[1], "snapshots/main/x.png") == linked.blobs / "a1b2"
    assert resolve_image([linked.data, linked.coco], "own.png") == linked.data / "own.png"


def test_the_last_folder_that_holds_a_path_counts(linked):
    (linked.coco / "own.png").write_bytes(b"another")
    assert resolve_image([linked.data, linked.coco], "own.png") == linked.coco / "own.png"
    assert resolve_image([linked.coco, linked.data], "own.png") == linked.data / "own.png"
    assert resolve_image([linked.data, linked.coco], "train/1.png") == linked.coco / "train/1.png"
    assert not resolve_image([linked.data, linked.coco], "none.png").exists()


@pytest.mark.parametrize(
    ("folders", "path"),
    [
        (["data"], "coco/train/1.png"),
        (["snapshot"], "x.png"),
        (["data", "coco"], "leak/key.png"),
        (["data", "coco"], "coco/train/hop.png"),
        (["data", "blobs"], "coco/train/1.png"),
        (["data", "coco"], "../../secret/key.png"),
        (["data", "coco"], "coco/../../secret/key.png"),
        (["snapshot", "blobs"], "../../blobs/a1b2"),  # climbs into a folder that only links may lead into
    ],
)
def test_escaping_paths_stay_refused(linked, folders, path):
    named = [getattr(linked, folder) for folder in folders]
    with pytest.raises(ValueError, match=f"image path {path} leaves the image folder .it leads to /") as error:
        resolve_image(named, path)
    assert ("by a further --image_folder" in str(error.value)) is (".." not in path)


@pytest.mark.parametrize("path", ["/etc/hostname", "C:\\x.png", "", "a\0.png"])
def test_paths_that_name_nothing_inside_are_refused(linked, path):
    with pytest.raises(ValueError, match="is absolute|names no file"):
        resolve_image([linked.data, linked.coco], path)


def pairs_file(folder, *images):
    scores = {"chosen_logits": [0.3], "rejected_logits": [0.1]}
    row = {"question": "What?", "chosen": "A cat.", "rejected": "A dog.", **scores}
    rows = [row | {"idx": str(number), "image_path": image} for number, image in enumerate(images)]
    path = folder / "pairs.json"
    path.write_text(json.dumps(rows))
    return str(path)


def test_every_command_takes_several_folders(linked, tmp_path, capsys):
    """The hardness stage with its page, training's flags, rows of fine-tuning, questions."""
    images = ("coco/train/1.png", "own.png")
    data = ["--data", pairs_file(tmp_path, *images), "--from_scores", "--out", str(tmp_path / "hardness")]
    folders = [str(linked.data), str(linked.coco)]
    assert main(["hardness", *data, "--image_folder", folders[0]]) == USER_ERROR
    assert "coco/train/1.png leaves the image folder" in capsys.readouterr().err
    assert main(["hardness", *data, "--image_folder", folders[0], "--image-folder", folders[1]]) == 0
    manifest = json.loads((tmp_path / "hardness/manifest.json").read_text())
    assert manifest["summary"]["image_folder"] == folders
    assert all(page.is_file() for page in write_hardness_page(tmp_path / "hardness", tmp_path / "page", folders))

    flags = ["--model_name_or_path", "m", "--data_path", data[1], "--output_dir", "o", "--use_cpu", "True"]
    for words in (["--image_folder", *folders], ["--image_folder", folders[0], f"--image_folder={folders[1]}"]):
        assert parse_arguments([*flags, *words])[1].image_folder == folders
    with pytest.raises(ValueError, match="--image_folder: expected an existing path, got 'nowhere'"):
        parse_arguments([*flags, "--image_folder", folders[0], "--image_folder", "nowhere"])

    talk = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "A cat."}]
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"id": image, "image": image, "conversations": talk} for image in images]))
    assert len(read_rows(str(rows), folders)) == 2
    with pytest.raises(ValueError, match="row coco/train/1.png: .* leaves the image folder"):
        read_rows(str(rows), folders[0], "skip")

    asked = [Request(image, "What?", image) for image in images]
    assert list(check_requests(asked, folders)) == list(images)
    with pytest.raises(ValueError, match="question coco/train/1.png: .* leaves the image folder"):
        check_requests(asked, folders[0])


def test_one_folder_is_recorded_as_before(linked, tmp_path):
    data = ["--data", pairs_file(tmp_path, "own.png"), "--from_scores", "--out", str(tmp_path / "hardness")]
    assert main(["hardness", *data, "--image_folder", str(linked.data)]) == 0
    manifest = json.loads((tmp_path / "hardness/manifest.json").read_text())
    assert manifest["summary"]["image_folder"] == str(linked.data)


# ---------------------------------------------------------------------------------------------------------------- sizes

REFUSED = {
    (1, 30_000): "1 x 30000 pixels, a side longer than 9,459 pixels",
    (30_000, 1): "30000 x 1 pixels, a side longer than 9,459 pixels",
    (9_460, 9_000): "9460 x 9000 pixels, a side longer than 9,459 pixels",
    (10_000, 10_000): "10000 x 10000 pixels, more than 89,478,485 pixels",
    (1, 201): "1 x 201 pixels, one side more than 200 times the other",
    (4_020, 20): "4020 x 20 pixels, one side more than 200 times the other",
}
TAKEN = [(1, 200), (4_000, 20), (9_459, 48), (1, 1)]


def png(size):
    buffer = io.BytesIO()
    Image.new("1", size).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("size", REFUSED, ids=str)
def test_images_too_large_to_pad_are_refused_wherever_they_are_read(tmp_path, size):
    """From a file of a few bytes: pairs, rows, questions, hardness, pixels, base64; by name where there is one."""
    name = "thin.png"
    (tmp_path / name).write_bytes(png(size))
    reason = REFUSED[size]
    image, config = Image.new("1", size), SimpleNamespace(image_aspect_ratio="pad")
    for read in (
        lambda: load_image(tmp_path / name),
        lambda: probe_image(tmp_path / name),
        lambda: probe_image(io.BytesIO(png(size))),
        lambda: load_image_from_base64(base64.b64encode(png(size))),
        lambda: expand2square(image, 0),
        lambda: process_images([image], None, config),
        lambda: process_images([image], None, SimpleNamespace(image_aspect_ratio="square")),
    ):
        with pytest.raises(ImageError, match=reason):
            read()
    with pytest.raises(ImageError, match=f"image .*{name} has {reason}"):
        load_image(tmp_path / name)
    with pytest.raises(ValueError, match=f"question 7: image {name}: image has {reason}"):
        check_requests([Request("7", "What?", name)], tmp_path)


def test_narrow_and_long_images_within_the_bounds_are_read(tmp_path):
    for size in TAKEN:
        (tmp_path / "x.png").write_bytes(png(size))
        assert probe_image(tmp_path / "x.png")[:2] == size
        assert load_image(tmp_path / "x.png").size == size


def test_pairs_and_their_hardness_name_the_pair(tmp_path, capsys):
    (tmp_path / "thin.png").write_bytes(png((1, 30_000)))
    data = ["--data", pairs_file(tmp_path, "thin.png"), "--from_scores", "--out", str(tmp_path / "hardness")]
    assert main(["hardness", *data, "--image_folder", str(tmp_path)]) == USER_ERROR
    assert "row 0 (image thin.png): image has 1 x 30000 pixels, a side longer" in capsys.readouterr().err


def test_golden_images_are_within_the_bounds():
    found = [load_image(path) for path in (GOLDEN / "images").iterdir() if path.suffix in (".png", ".jpg")]
    assert len(found) > 3
