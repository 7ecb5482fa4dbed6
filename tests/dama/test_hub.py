"""A hub that does not answer is asked once; one that says no is still a hub."""

import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from huggingface_hub import constants, hf_api

from dama import hub
from llava.supported import read_small_file


@pytest.fixture
def hub_at(monkeypatch):
    """A function that lets the hub be at an address, and lets this process be one that has not asked yet."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_asked", [])

    def move(port):
        address, files = f"http://127.0.0.1:{port}", constants.HUGGINGFACE_CO_URL_TEMPLATE
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files.replace(constants.ENDPOINT, address))
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(hf_api.api, "endpoint", address)

    return move


def test_a_hub_that_does_not_answer_is_asked_once(hub_at, capsys):
    with socket.socket() as nobody:  # bound and not listening: refused at once
        nobody.bind(("127.0.0.1", 0))
        hub_at(nobody.getsockname()[1])
        start = time.monotonic()
        assert [read_small_file("owner/name", name) for name in ("config.json", "adapter_config.json")] == [{}, {}]
        assert time.monotonic() - start < 15  # its library alone pauses for 23 s at each file
    assert constants.HF_HUB_OFFLINE
    said = capsys.readouterr()
    assert said.out.count("does not answer") == 1 and "only what its local cache holds can be loaded" in said.out


def test_a_hub_that_says_no_is_still_a_hub(hub_at, capsys):
    class No(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(404)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), No) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        hub_at(server.server_port)
        assert read_small_file("owner/name", "config.json") == {}
        server.shutdown()
    assert not constants.HF_HUB_OFFLINE and "does not answer" not in capsys.readouterr().out


def test_a_folder_asks_nobody(hub_at, tmp_path):
    hub_at(1)
    hub.go_offline_without_hub(str(tmp_path))
    assert not constants.HF_HUB_OFFLINE and hub._asked == []
