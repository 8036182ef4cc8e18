"""The demo page: what it answers, whom it answers, and that it loads nothing from anywhere else."""

from __future__ import annotations

import base64
import http.client
import io
import json
import re
import signal
import socket
import struct
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image
from runs import ROOT, environment
from test_report import Reader

from analysis import demo, predictions
from analysis.demo_page import Demo
from analysis.demo_server import LARGEST_BODY, Server
from base.errors import ResourceError, UsageError

CLASSES = {"cat", "dog", "owl"}


@pytest.fixture(scope="module")
def shown(photos, photo_run) -> Demo:
    config, given = demo.arguments.parse(
        demo.build_parser(), [str(photo_run), "--data-dir", str(photos), "--device", "cpu"]
    )
    return Demo(predictions.load_with_data(config, given))


@pytest.fixture(scope="module")
def server(shown):
    with Server(0, shown.page(), shown.answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server, body: bytes | None = None, path: str = "/answer", method: str = "POST", **headers: str):
    """Return status, headers and content of an answer; JSON is parsed."""
    connection = http.client.HTTPConnection(*server.server_address, timeout=60)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, named)
    reply = connection.getresponse()
    content = reply.read()
    connection.close()
    parsed = json.loads(content) if reply.headers["Content-Type"] == "application/json" else content.decode()
    return reply.status, reply.headers, parsed


def pixels_of(url: str) -> np.ndarray:
    data = base64.b64decode(url.removeprefix("data:image/png;base64,"))
    return np.asarray(Image.open(io.BytesIO(data)))


def test_a_photo_is_answered_as_predict_py_does_with_the_evidence_for_each_class(server, shown, photos):
    path = photos / "val" / "dog" / "dog_3.JPEG"
    status, headers, found = ask(server, path.read_bytes())
    assert status == 200 and headers["Cache-Control"] == "no-store"
    (expected,), _ = shown.classifier.predict_files([str(path)], 5, 1, 0)
    likeliest = [(one["name"], one["probability"]) for one in expected["predictions"]]
    assert [one["name"] for one in found["classes"]] == [name for name, _ in likeliest]
    assert [one["percent"] / 100 for one in found["classes"]] == pytest.approx([p for _, p in likeliest])
    assert (pixels_of(found["seen"]) == shown.classifier.pixels([path.read_bytes()], [""])[0]).all()
    assert all(pixels_of(one["map"]).shape == (24, 24, 3) for one in found["classes"])
    assert found["truth"] == "" and "2 × 2" in found["evidence"]


def test_an_example_is_a_validation_image_with_its_truth(server, shown):
    _, _, found = ask(server, path="/answer?example=0")
    assert found["truth"] == "cat" and {one["name"] for one in found["classes"]} == CLASSES
    assert (pixels_of(found["seen"]) == shown.classifier.val_pixels(shown.examples[:1])[0]).all()
    for number in ("8", "-1", "1e0", "", "x", "%200"):
        status, _, found = ask(server, path=f"/answer?example={number}")
        assert (status, list(found)) == (400, ["error"]), number


@pytest.mark.parametrize("body", [b"", b"no image", b"\xff\xd8\xff\xe0 cut short", b"<svg onload=alert(1)>"])
def test_what_is_no_image_is_said_on_the_page(server, body):
    status, _, found = ask(server, body)
    assert status == 400 and found["error"].startswith("This file cannot be used: ")


def test_a_fault_of_the_machine_is_said_on_the_page(server, shown, photos, monkeypatch):
    def vanished(ids):
        raise FileNotFoundError(2, "No such file or directory", "owl.jpg")

    monkeypatch.setattr(shown.classifier.index.val, "read", vanished)
    status, _, found = ask(server, path="/answer?example=0")
    assert status == 500 and "owl.jpg" in found["error"]


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(server):
    bomb = io.BytesIO()
    Image.new("1", (20_000, 10_000)).save(bomb, "PNG")
    status, _, found = ask(server, bomb.getvalue())
    assert status == 400 and "pixels" in found["error"]


def test_a_body_without_a_proper_length_is_refused(server):
    for length, status in (
        (str(LARGEST_BODY + 1), 413),
        ("9" * 5000, 413),
        ("-1", 411),
        ("x", 411),
        ("٣", 411),
    ):
        assert ask(server, Content_Length=length.encode("utf-8").decode("latin-1"))[0] == status, length


def test_only_this_page_is_answered(server, photos):
    image, host = (photos / "val" / "owl" / "owl_0.JPEG").read_bytes(), server.address.split("/")[2]
    for name in (
        "evil.example",
        "evil.example:80",
        "127.0.0.1.evil.example:80",
        "",
        "[::1]:80",
        "127.0.0.1.:80",
    ):
        assert ask(server, image, Host=name)[0] == 403, name
        assert ask(server, path="/", method="GET", Host=name)[0] == 403, name
    for origin in ("http://evil.example", "null", "https://" + host, f"http://{host}.evil.example"):
        assert ask(server, image, Origin=origin)[0] == 403, origin
    assert ask(server, image, Origin=f"http://{host}")[0] == 200
    assert ask(server, image, Host="localhost:8000", Origin="http://localhost:8000")[0] == 200  # through ssh
    assert ask(server, path="/other", method="GET")[0] == ask(server, path="/other")[0] == 404
    assert server.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize("fault", [None, ValueError("a bug")])
def test_only_bugs_print_a_traceback_and_not_a_tab_that_is_closed_during_an_answer(fault, capsys):
    closed, done = threading.Event(), threading.Event()

    def answer(image, query):
        closed.wait(60)
        if fault:
            raise fault
        return {}

    with Server(0, "page", answer) as server:
        server.shutdown_request = lambda request: (request.close(), done.set())
        threading.Thread(target=server.handle_request).start()
        with socket.create_connection(server.server_address) as client:
            client.sendall(b"POST /answer HTTP/1.0\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n")
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
        closed.set()
        assert done.wait(60)
    assert ("Traceback" in capsys.readouterr().err) == bool(fault)


def test_the_page_names_the_model_and_loads_nothing_from_anywhere(server):
    _, headers, text = ask(server, path="/", method="GET")
    reader = Reader(text)
    words = " ".join(" ".join(reader.text).split())
    for expected in ("resnet_tiny", "parameters", "classes 3", "24 px", "epochs 2 of 2", "commit"):
        assert expected in words, expected
    addresses = [value for name, value in reader.attributes if name in ("src", "href", "action", "srcset")]
    assert addresses and all(address.startswith("data:image/png;base64,") for address in addresses)
    assert headers["Referrer-Policy"] == "no-referrer"
    assert not re.search(r"https?:|url\(|@import", text)
    policy = next(value for name, value in reader.attributes if name == "content")
    assert policy.startswith("default-src 'none'; img-src data:;") and policy.endswith("; connect-src 'self'")


def test_names_of_classes_and_files_stay_text(shown, monkeypatch):
    evil = "<img src=x onerror=alert(1)>"
    monkeypatch.setitem(shown.classifier.payload["eval"], "class_names", [evil] * 3)
    assert evil not in shown.page()
    assert "innerHTML" not in shown.page()


def test_an_unknown_layer_and_a_network_without_a_map_still_predict(shown, photos):
    image = (photos / "val" / "cat" / "cat_0.JPEG").read_bytes()
    found = Demo(shown.classifier, "fc").answer(image, {})
    assert "No map of the evidence" in found["evidence"]
    assert len(found["classes"]) == 3 and not any(one["map"] for one in found["classes"])


def test_a_taken_port_is_an_error_with_a_fix(server, photo_run):
    with pytest.raises(ResourceError, match=r"cannot listen on 127\.0\.0\.1"):
        demo.main([str(photo_run), "--port", str(server.server_address[1]), "--device", "cpu"])
    with pytest.raises(UsageError):
        demo.main([str(photo_run), "--port", "65536"])


def test_the_command_serves_until_ctrl_c(photo_run, photos):
    command = [sys.executable, "-m", "analysis.demo", str(photo_run), "--device", "cpu"]
    options = {"stdout": subprocess.PIPE, "text": True, "cwd": ROOT, "env": environment()}
    with subprocess.Popen(command, **options) as process:
        address = process.stdout.readline().split()[1]
        host, port = address.removeprefix("http://").strip("/").split(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=60)
        connection.request("POST", "/answer", (photos / "val" / "cat" / "cat_0.JPEG").read_bytes())
        assert {one["name"] for one in json.load(connection.getresponse())["classes"]} == CLASSES
        connection.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
