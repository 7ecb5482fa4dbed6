"""Official files: continued, checked, atomic; packages and archives; one message for all that is missing."""

import base64
import io
import json
import os
import re
import socket
import threading
import zipfile
from hashlib import sha256
from pathlib import Path

import pytest
from PIL import Image

from eval import benchmarks
from eval import download as command
from eval.core import transfer
from eval.core.transfer import TransferError, download, members
from eval.download import DownloadError, fetch, main
from tests.eval.loopback import FileServer

CONTENT = bytes(range(256)) * 40
OFFICIAL = os.environ.get("DAMA_BENCH_DATA")
needs_official = pytest.mark.skipif(not OFFICIAL, reason="DAMA_BENCH_DATA names no folder")


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(transfer, "PAUSE", 0.001)


def jpeg(colour="red"):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(buffer, "JPEG")
    return buffer.getvalue()


def archive(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return buffer.getvalue()


def left_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# ------------------------------------------------------------------------------------------------------- one file


def test_a_cut_connection_is_continued(tmp_path):
    server = FileServer({"a": CONTENT}, cut={"a": [4000, 9000]})
    with server as url:
        got = download(f"{url}/a", tmp_path / "a", sha256(CONTENT).hexdigest())
    assert (tmp_path / "a").read_bytes() == CONTENT and got.size == len(CONTENT)
    assert server.seen == [("a", None), ("a", "bytes=4000-"), ("a", "bytes=9000-")]
    assert left_in(tmp_path) == ["a"]


def test_a_later_run_goes_on_where_the_first_gave_up(tmp_path):
    server = FileServer({"a": CONTENT}, cut={"a": [4000, 4000, 4000, 4000]})
    with server as url:
        with pytest.raises(TransferError, match="the connection ended after 4000 of 10240 bytes"):
            download(f"{url}/a", tmp_path / "a")
        assert left_in(tmp_path) == ["a.part", "a.part.version"]  # nothing half done in its place
        download(f"{url}/a", tmp_path / "a")
    assert server.seen[-1] == ("a", "bytes=4000-") and (tmp_path / "a").read_bytes() == CONTENT


def test_two_versions_are_never_mixed(tmp_path):
    """The file changes at its home after half of it came: all of the new one is taken."""
    server = FileServer({"a": CONTENT}, cut={"a": [4000] * 4})
    with server as url:
        with pytest.raises(TransferError):
            download(f"{url}/a", tmp_path / "a")
        server.files["a"] = CONTENT[::-1]
        download(f"{url}/a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize("settings", [{"ranges": False}, {"versions": False}])
def test_servers_without_ranges_or_versions_start_again(tmp_path, settings):
    server = FileServer({"a": CONTENT}, cut={"a": [4000]}, **settings)
    with server as url:
        download(f"{url}/a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == CONTENT


def test_a_part_that_is_no_beginning_is_dropped(tmp_path):
    (tmp_path / "a.part").write_bytes(CONTENT * 2)
    with FileServer({"a": CONTENT}) as url:
        download(f"{url}/a", tmp_path / "a", sha256(CONTENT).hexdigest())
    assert (tmp_path / "a").read_bytes() == CONTENT


def test_a_wrong_digest_is_refused(tmp_path):
    wanted = "0" * 64
    with FileServer({"a": CONTENT}) as url, pytest.raises(TransferError, match=f"expected SHA-256 {wanted}, got "):
        download(f"{url}/a", tmp_path / "a", wanted)
    assert left_in(tmp_path) == []


@pytest.mark.parametrize(("status", "attempts"), [(404, 1), (403, 1), (503, 3), (429, 3)])
def test_only_what_may_pass_is_tried_again(tmp_path, status, attempts):
    server = FileServer({"a": CONTENT}, status={"a": status})
    with server as url, pytest.raises(TransferError, match=str(status)):
        download(f"{url}/a", tmp_path / "a")
    assert len(server.seen) == attempts


def test_only_http(tmp_path):
    with pytest.raises(TransferError, match="no http or https address"):
        download("file:///etc/hosts", tmp_path / "a")


# -------------------------------------------------------------------------------------------------------- archives


@pytest.mark.parametrize("evil", ["../evil.jpg", "/tmp/evil.jpg", "a/../../evil.jpg", r"..\evil.jpg", r"C:\evil.jpg"])
def test_archives_that_leave_their_folder_are_refused(tmp_path, evil):
    (tmp_path / "a.zip").write_bytes(archive({"images/good.jpg": jpeg(), evil: jpeg()}))
    with pytest.raises(TransferError, match="leaves the folder; nothing was taken out"):
        list(members(tmp_path / "a.zip", ["good.jpg", "evil.jpg"]))


def test_links_and_doubles_in_archives_are_refused(tmp_path):
    link = zipfile.ZipInfo("good.jpg")
    link.external_attr = 0o120777 << 16
    (tmp_path / "a.zip").write_bytes(archive({link: "/etc/hosts"}))
    with pytest.raises(TransferError, match="'good.jpg' is a link"):
        list(members(tmp_path / "a.zip", ["good.jpg"]))
    (tmp_path / "a.zip").write_bytes(archive({"a/good.jpg": jpeg(), "b/good.jpg": jpeg("blue")}))
    with pytest.raises(TransferError, match="two files named 'good.jpg'"):
        list(members(tmp_path / "a.zip", ["good.jpg"]))


def test_what_is_no_archive(tmp_path, monkeypatch):
    (tmp_path / "a.zip").write_bytes(b"<html>quota exceeded</html>")
    with pytest.raises(TransferError, match="a.zip is no zip archive that can be read"):
        list(members(tmp_path / "a.zip", ["good.jpg"]))
    monkeypatch.setattr(transfer, "LARGEST_MEMBER", 10)
    (tmp_path / "a.zip").write_bytes(archive({"good.jpg": jpeg()}))
    with pytest.raises(TransferError, match="more than 10 bytes"):
        list(members(tmp_path / "a.zip", ["good.jpg"]))


# ------------------------------------------------------------------------------------------------------ benchmarks


def mm_vet(pictures):
    questions = {
        f"v1_{i}": {"imagename": name, "question": "What?", "answer": "x", "capability": ["rec"]}
        for i, name in enumerate(pictures)
    }
    return archive(
        {"mm-vet/mm-vet.json": json.dumps(questions)} | {f"mm-vet/images/{n}": c for n, c in pictures.items()}
    )


def test_a_package_gives_questions_and_pictures(tmp_path, capsys):
    package = mm_vet({"v1_0.jpg": jpeg(), "v1_1.jpg": jpeg("blue")})
    server = FileServer({"mmvet/mm-vet.zip": package, "mmvet/mm-vet_evaluator.py": b"pass"})
    server.headers["X-Repo-Commit"] = "0123abcd"
    with server as url:
        fetch(["mmvet"], tmp_path, mirror=url)
        said = capsys.readouterr().out
        asked = len(server.seen)
        fetch(["mmvet"], tmp_path, mirror=url)
    assert asked == len(server.seen) == 2  # the second run only checks
    assert left_in(tmp_path / "mmvet/images") == ["v1_0.jpg", "v1_1.jpg"]
    digest = sha256(package).hexdigest()
    assert re.search(
        rf"recorded: mmvet/mm-vet.zip .* at revision 0123abcd  {len(package)} bytes  SHA-256 {digest}", said
    )
    record = json.loads((tmp_path / "downloads.json").read_text())
    assert record["mmvet/mm-vet.zip"]["sha256"] == digest and "mmvet/mm-vet.json" in record


def test_what_was_recorded_must_stay(tmp_path):
    with FileServer({"mmvet/mm-vet.zip": mm_vet({"v1_0.jpg": jpeg()}), "mmvet/mm-vet_evaluator.py": b"pass"}) as url:
        fetch(["mmvet"], tmp_path, mirror=url)
    (tmp_path / "mmvet/mm-vet_evaluator.py").write_text("other")
    with pytest.raises(
        DownloadError, match="mm-vet_evaluator.py: expected SHA-256 .*; delete it to have it from https"
    ):
        fetch(["mmvet"], tmp_path, offline=True)


def test_pictures_that_do_not_decode(tmp_path):
    package = mm_vet({"v1_0.jpg": jpeg()[:-90], "v1_1.jpg": jpeg()})
    server = FileServer({"mmvet/mm-vet.zip": package, "mmvet/mm-vet_evaluator.py": b"pass"})
    with server as url, pytest.raises(DownloadError, match="mmvet/mm-vet.zip: image is unreadable"):
        fetch(["mmvet"], tmp_path, mirror=url)
    assert not (tmp_path / "mmvet/images/v1_0.jpg").exists()


def test_pictures_come_one_by_one_and_only_the_chosen(tmp_path):
    """The questions are there; of three pictures two are needed, and one of them is an error page."""
    rows = [{"question_id": i, "image": f"00{i}.jpg", "text": "?", "category": "conv"} for i in range(3)]
    files = {f"llava_bench/{name}": b"{}\n" for name in ("context.jsonl", "answers_gpt4.jsonl")}
    files["llava_bench/questions.jsonl"] = "".join(json.dumps(row) + "\n" for row in rows).encode()
    files |= {"llava_bench/images/000.jpg": jpeg(), "llava_bench/images/001.jpg": b"<html>"}
    (tmp_path / "llava_bench").mkdir()
    with FileServer(files | {"llava_bench/rule.json": b"{}"}) as url, pytest.raises(DownloadError) as error:
        fetch(["llavabench"], tmp_path, chosen=["000.jpg", "001.jpg"], mirror=url)
    assert "llava_bench/rule.json: from https://raw.githubusercontent.com/haotian-liu" in str(
        error.value
    )  # wrong digest
    assert "llava_bench/images/: 1 images (001.jpg), each from https://huggingface.co/" in str(error.value)
    assert "002.jpg" not in str(error.value)
    assert left_in(tmp_path / "llava_bench/images") == ["000.jpg"]


def test_offline_and_incomplete_is_one_message(tmp_path, capsys, monkeypatch):
    """Nothing answers at the address: every file is named with home and place, and the folder stays as it was."""
    monkeypatch.setenv("DAMA_BENCH_DATA", str(tmp_path / "data"))
    assert main(["--mirror", "http://127.0.0.1:9"]) == 2
    said = capsys.readouterr().err
    for benchmark in benchmarks.BENCHMARKS:
        for file in benchmark.files:
            assert file.path in said and file.source in said, benchmark.name
        assert f"{benchmark.images.folder}/" in said
    assert "Remedy: run `python -m eval.download`" in said and said.count("Remedy") == 1
    assert str(tmp_path / "data") in said and not (tmp_path / "data").exists()


def test_names_that_leave_the_folder(tmp_path):
    rows = {"v1_0": {"imagename": "../../evil.png", "question": "", "answer": "", "capability": []}}
    (tmp_path / "mmvet").mkdir()
    (tmp_path / "mmvet/mm-vet.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="evil.png leaves the image folder"):
        fetch(["mmvet"], tmp_path, offline=True)


# ------------------------------------------------------------------------------------------------ content and record

QUESTION = {"question_id": 1, "image": "001.jpg", "text": "?", "category": "conv"}
LLAVA_BENCH = {
    "llava_bench/questions.jsonl": json.dumps(QUESTION).encode(),
    "llava_bench/context.jsonl": b'{"image": "001.jpg", "caption": "A cup."}',
    "llava_bench/answers_gpt4.jsonl": b'{"question_id": 1, "text": "A cup."}',
}
LOGIN = b"<!doctype html><title>Log in</title>"


def faults_of(name, folder, **others):
    """What a fetch complains of; "" where it does not."""
    try:
        fetch([name], folder, **others)
    except DownloadError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    "wrong", [LOGIN, b'{"error": "log in first"}', b"", b"Access denied", b"[1, 2]", b"\xff\xfe", b"[" * 9999]
)
@pytest.mark.parametrize("path", ["llava_bench/questions.jsonl", "mmvet/mm-vet.zip", "mmvet/mm-vet_evaluator.py"])
def test_another_content_never_becomes_the_reference(tmp_path, path, wrong, capsys):
    """It is neither kept nor recorded; and the right file, which comes later or by hand, is taken."""
    name = {"llava_bench": "llavabench"}.get(path.split("/")[0], "mmvet")
    right = LLAVA_BENCH | {"mmvet/mm-vet.zip": mm_vet({"v1_0.jpg": jpeg()}), "mmvet/mm-vet_evaluator.py": b"pass"}
    with FileServer(right | {path: wrong}) as url:
        assert re.search(rf"{path}[^\n]*\((expected|'utf-8' codec)", faults_of(name, tmp_path, mirror=url))
    record = tmp_path / "downloads.json"
    assert not (tmp_path / path).exists() and (not record.exists() or path not in json.loads(record.read_text()))
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).write_bytes(wrong)  # saved by a browser
    (tmp_path / "mmvet/mm-vet.json").unlink(missing_ok=True)
    with FileServer({}) as url:
        said = faults_of(name, tmp_path, mirror=url)
        assert f"{path}: its content is that of another file" in said and "; delete it to have it" in said
        (tmp_path / path).write_bytes(right[path])
        assert "its content" not in faults_of(name, tmp_path, mirror=url)


def test_a_wrong_record_is_replaced_as_the_message_says(tmp_path, capsys):
    """The reference is that of a login page, from a version that recorded one; the right file is put there by hand."""
    package = mm_vet({"v1_0.jpg": jpeg()})
    with FileServer({"mmvet/mm-vet.zip": package, "mmvet/mm-vet_evaluator.py": b"pass"}) as url:
        fetch(["mmvet"], tmp_path, mirror=url)
    record = tmp_path / "downloads.json"
    entries = json.loads(record.read_text())
    entries["mmvet/mm-vet_evaluator.py"]["sha256"] = sha256(LOGIN).hexdigest()
    record.write_text(json.dumps(entries))
    flags = ["mmvet", "--folder", str(tmp_path)]
    assert main([*flags, "--mirror", "http://127.0.0.1:9"]) == 2
    (advice,) = re.findall(r"--accept \S+", capsys.readouterr().err)
    assert main([*flags, *advice.split()]) == 0
    assert json.loads(record.read_text())["mmvet/mm-vet_evaluator.py"]["sha256"] == sha256(b"pass").hexdigest()
    fetch(["mmvet"], tmp_path, offline=True)
    (tmp_path / "mmvet/mm-vet_evaluator.py").write_bytes(LOGIN)
    assert main([*flags, *advice.split(), "--mirror", "http://127.0.0.1:9"]) == 2  # a page is never accepted
    with pytest.raises(SystemExit):
        main([*flags, "--accept", "../../etc/passwd"])


@pytest.mark.parametrize(
    "junk", ["[]", "1", "null", '"text"', "{", "", "[" * 99_999, '{"a": 1}', '{"a": null}', '{"a": {"sha256": 3}}',
             '{"a": {"sha256": "../x"}}', '{"a": [{}]}', "\udcff"],
)  # fmt: skip
def test_a_record_that_is_none_is_named(tmp_path, capsys, junk):
    (tmp_path / "downloads.json").write_bytes(junk.encode("utf-8", "surrogateescape"))
    (tmp_path / "mmvet").mkdir()
    (tmp_path / "mmvet/mm-vet_evaluator.py").write_text("pass")
    assert main(["mmvet", "--folder", str(tmp_path), "--mirror", "http://127.0.0.1:9"]) == 2
    said = capsys.readouterr().err
    assert re.search(r"downloads.json: (cannot be read|expected|1 error)", said) and "Remedy: delete" in said
    assert "Traceback" not in said


def test_credentials_of_a_mirror_are_not_recorded(tmp_path, capsys):
    files = {"mmvet/mm-vet.zip": mm_vet({"v1_0.jpg": jpeg()}), "mmvet/mm-vet_evaluator.py": b"pass"}
    with FileServer(files) as url:
        flags = ["mmvet", "--folder", str(tmp_path), "--mirror"]
        main([*flags, url.replace("//", "//user:pass-word-42@")])
        said = capsys.readouterr()
    assert "pass-word-42" not in f"{said.out} {said.err}"
    assert all("pass-word-42" not in path.read_text() for path in tmp_path.rglob("downloads.json"))


# ------------------------------------------------------------------------------------------------------ bytes and pace


def test_a_file_of_known_size_ends_there(tmp_path):
    server = FileServer({"a": CONTENT * 100})
    with server as url, pytest.raises(TransferError, match="expected at most 10240 bytes, got more"):
        download(f"{url}/a", tmp_path / "a", sha256(CONTENT).hexdigest(), size=len(CONTENT))
    assert left_in(tmp_path) == []
    assert len(server.seen) == 1


class Endless:
    """`with Endless(head, block, pause) as url`: sends `head`, then `block` every `pause` s until the client leaves."""

    def __init__(self, head, block, pause):
        self.head, self.block, self.pause, self.stopped = head, block, pause, threading.Event()
        self.connections = 0

    def __enter__(self):
        self.socket = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self.serve, daemon=True).start()
        return f"http://127.0.0.1:{self.socket.getsockname()[1]}"

    def serve(self):
        while not self.stopped.is_set():
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self.send, args=(connection,), daemon=True).start()

    def send(self, connection):
        with connection:
            try:
                connection.recv(1 << 16)
                connection.sendall(self.head)
                while not self.stopped.wait(self.pause):
                    connection.sendall(self.block)
            except OSError:  # the client has gone
                return

    def __exit__(self, *_):
        self.stopped.set()
        self.socket.close()


OK = b"HTTP/1.1 200 OK\r\n\r\n"


@pytest.mark.parametrize(
    ("head", "block", "pause", "words"),
    [
        (OK, b"x" * 65536, 0, "expected at most 1000000 bytes"),
        (OK, b"x", 0.02, "slower than 1000 bytes a second"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n", b"x", 0.02, "slower than 1000 bytes a second"),
        (b"HTTP/1.1 200 OK\r\nX-Padding: ", b"x", 0.02, "slower than|RemoteDisconnected|closed|BadStatusLine"),
        (b"", b"x", 0.02, "slower than|RemoteDisconnected|closed|BadStatusLine|LineTooLong"),
    ],
)
def test_a_download_has_a_largest_size_and_a_least_pace(tmp_path, monkeypatch, head, block, pause, words):
    """Endless bodies, and a byte now and then in body, header and status line, which no limit on silence ends."""
    monkeypatch.setattr(transfer, "LARGEST_FILE", 1_000_000)
    monkeypatch.setattr(transfer, "PATIENCE", 0.5)
    server = Endless(head, block, pause)
    with server as url, pytest.raises(TransferError, match=words):
        download(f"{url}/a", tmp_path / "a")
    assert server.connections <= 3
    assert not (tmp_path / "a").exists()


def test_a_byte_for_each_connection_is_too_slow(tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "PATIENCE", 0.3)
    server = FileServer({"a": CONTENT}, cut={"a": list(range(1, 10_000))})
    monkeypatch.setattr(transfer, "PAUSE", 0.02)
    with server as url, pytest.raises(TransferError, match="slower than"):
        download(f"{url}/a", tmp_path / "a", sha256(CONTENT).hexdigest())


def test_unknown_benchmarks(capsys):
    with pytest.raises(SystemExit):
        main(["objhall"])
    assert "unknown: objhall; expected some of objhal, amber" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- Object HalBench


def coco_annotations(pictures):
    """A bench on 7 and 8: an instance of a dog, and captions that name a cup and, once more, the dog."""
    instances = {
        "categories": [{"id": 18, "name": "dog"}],
        "annotations": [{"image_id": pictures[0], "category_id": 18}, {"image_id": 99, "category_id": 18}],
    }
    captions = {"annotations": [
        {"image_id": pictures[0], "caption": "Two dogs beside a cup."}, {"image_id": 99, "caption": "A cat."},
    ]}  # fmt: skip
    return archive({
        "annotations/instances_val2014.json": json.dumps(instances),
        "annotations/captions_val2014.json": json.dumps(captions),
    })  # fmt: skip


def objhal_package(rows):
    return "".join(
        json.dumps(row | {"image": base64.b64encode(jpeg()).decode()}) + "\n" for row in rows
    ).encode()  # fmt: skip


def objhal_mirror(rows, synonyms):
    return {
        "objhal/obj_halbench_300_with_image.jsonl": objhal_package(rows),
        "objhal/synonyms_refine.txt": synonyms,
        "objhal/eval_gpt_obj_halbench.py": b"pass",
        "coco/annotations_trainval2014.zip": coco_annotations([row["image_id"] for row in rows]),
    }


@needs_official
def test_the_published_questions_come_out_of_the_package(tmp_path, capsys):
    """The 300 questions equal the published digest; the ground truth is made from COCO's annotations and recorded."""
    questions = Path(OFFICIAL, "objhal/obj_halbench_300_questions.jsonl")
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    with FileServer(objhal_mirror(rows, Path(OFFICIAL, "objhal/synonyms_refine.txt").read_bytes())) as url:
        fetch(["objhal"], tmp_path, mirror=url)
    assert (tmp_path / "objhal/obj_halbench_300_questions.jsonl").read_bytes() == questions.read_bytes()
    assert len(left_in(tmp_path / "coco/val2014")) == 300
    truth = json.loads((tmp_path / "objhal/gt_objects_300.json").read_text())
    assert truth[str(rows[0]["image_id"])] == ["cup", "dog"] and truth[str(rows[1]["image_id"])] == []
    assert (
        "gt_objects_300.json  made from coco/annotations_trainval2014.zip, another content" in capsys.readouterr().out
    )
    fetch(["objhal"], tmp_path, offline=True)


@needs_official
def test_the_ground_truth_is_written_as_published():
    """Sorted names, one a line: so the same objects are the same bytes and have the published digest."""
    path = Path(OFFICIAL, "objhal/gt_objects_300.json")
    again = json.dumps({key: sorted(found) for key, found in json.loads(path.read_text()).items()}, indent=0)
    assert again.encode() == path.read_bytes()


@needs_official
def test_the_official_files_have_the_digests_of_the_table(capsys):
    """Every file of the folder that the table knows is right, and the list says so."""
    assert main(["--list", "--folder", OFFICIAL]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    known = {path: (digest, size) for path, state, digest, size, _ in rows if digest != "-" and state == "there"}
    assert len(known) == 18
    for path, (digest, size) in known.items():
        content = Path(OFFICIAL, path).read_bytes()
        assert (sha256(content).hexdigest(), str(len(content))) == (digest, size), path
    images = [path for path, *_ in rows if path.startswith("coco/val2014/")]  # CHAIR asks about POPE's 500
    assert len(images) == 300 + 500 + 500 and len(set(images)) == 799


@needs_official
def test_amber_and_pope_from_a_mirror(tmp_path):
    """Their official files over HTTP, and the pictures of the first questions."""
    files = {
        file.path: Path(OFFICIAL, file.path).read_bytes()
        for name in ("amber", "pope")
        for file in benchmarks.named(name).files
    }
    files["amber/AMBER.zip"] = archive({f"image/AMBER_{i}.jpg": jpeg() for i in (1, 2)})
    files["coco/val2014/COCO_val2014_000000310196.jpg"] = jpeg()
    chosen = ["AMBER_1.jpg", "AMBER_2.jpg", "COCO_val2014_000000310196.jpg"]
    (tmp_path / "amber").mkdir()
    (tmp_path / "amber/AMBER.zip").write_bytes(files.pop("amber/AMBER.zip"))  # put there by hand
    with FileServer(files, cut={"amber/annotations.json": [100_000]}) as url:
        fetch(["amber", "pope"], tmp_path, chosen=chosen, mirror=url)
    assert left_in(tmp_path / "amber/images") == chosen[:2]
    assert all((tmp_path / path).read_bytes() == content for path, content in files.items())


def test_a_given_folder_is_the_data_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("DAMA_BENCH_DATA", raising=False)
    assert command.data_folder() == Path("playground/data/eval")
    monkeypatch.setenv("DAMA_BENCH_DATA", str(tmp_path))
    assert command.data_folder() == tmp_path
