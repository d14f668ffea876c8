"""The studio without a browser: what is offered and refused, and that the page, Python and the command draw the same."""

import http.server
import json
import re
import shlex
import shutil
import threading
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from flowback import InputError
from flowback.cli import main
from flowback.core.units import to_uint8
from flowback.studio import draw
from flowback.studio.app import page, serve
from flowback.studio.common import Studio, class_numbers, number, problem
from flowback.studio.shelf import Shelf
from flowback.tasks.sampling import Request, alike, draw_batches, trajectory

CPU = torch.device("cpu")
NASTY = "<img src=x onerror=document.title='taken'>"


@pytest.fixture(scope="module")
def runs(small_run, tmp_path_factory):
    """A folder of two runs, one of them with a name and classes that are markup."""
    folder = tmp_path_factory.mktemp("studio")
    shutil.copytree(small_run, folder / "plain")
    nasty = folder / "<b>bold"
    shutil.copytree(small_run, nasty)
    (nasty / "classes.json").write_text(json.dumps([NASTY, *"123456789"]))
    (folder / "notes").mkdir()
    return folder


@pytest.fixture
def shelf(runs):
    return Shelf([str(runs)], CPU)


@pytest.fixture(scope="module")
def server(runs):
    with Studio(Shelf([str(runs)], CPU)) as studio:
        blocks = serve(studio)
        yield blocks.local_url.rstrip("/")
        blocks.close(verbose=False)


def test_runs_are_found_and_nothing_else(shelf, runs):
    assert shelf.refresh() == [f"{runs.name}/<b>bold", f"{runs.name}/plain"]
    assert Shelf([str(runs), str(runs)], CPU).refresh() == shelf.refresh()
    with pytest.raises(InputError, match="holds no run with a checkpoint"):
        Shelf([str(runs / "notes")], CPU)
    with pytest.raises(InputError, match=r"there is no folder|neither a folder"):
        Shelf([str(runs / "nothing")], CPU)
    for name in ("/etc", str(runs), f"{runs}/plain/../plain", ""):
        with pytest.raises(InputError, match="one of the list"):
            shelf.flow(name)


def test_a_run_that_is_trained_on_is_loaded_anew(runs, tmp_path):
    run = shutil.copytree(runs / "plain", tmp_path / "plain")
    shelf = Shelf([str(run)], CPU)
    flow = shelf.flow("plain")
    assert shelf.flow("plain") is flow
    assert main(["train", f"--config={run / 'config.yaml'}", "--train.resume", "--train.steps=3"]) == 0
    assert shelf.flow("plain") is not flow


def test_a_damaged_run_keeps_no_other_from_being_shown(runs, tmp_path, capsys):
    for name in ("a", "b"):
        shutil.copytree(runs / "plain", tmp_path / name)
    next((tmp_path / "a").glob("checkpoints/*/model.safetensors")).write_bytes(b"no tensors")
    with Studio(Shelf([str(tmp_path)], CPU)) as studio:
        assert studio.shelf.first() == f"{tmp_path.name}/b"
        assert "left aside" in capsys.readouterr().out
        page(studio)
        shutil.rmtree(tmp_path / "b")
        studio.shelf.refresh()
        with pytest.raises(InputError, match="none of the flows"):
            studio.shelf.first()


def test_names_are_no_markup(shelf, runs):
    name = f"{runs.name}/<b>bold"
    assert "<b>" not in shelf.card(name)
    assert shelf.classes(name)[0] == NASTY  # a dropdown shows text
    assert "<img" not in problem(InputError(NASTY)).message


def test_a_card_says_what_is_known(shelf, runs):
    facts = shelf.facts(f"{runs.name}/plain")
    assert facts["data"] == "digits"
    assert "2 steps" in facts["trained"]
    assert "2 blocks" in facts["flow"]


@pytest.mark.parametrize("value", [None, "3", float("nan"), 0, 65, 1.5, True])
def test_numbers_are_checked(value):
    with pytest.raises(InputError, match="the number must be a whole number of 1 to 64"):
        number(value, "the number", 1, 64, whole=True)


def test_classes_are_chosen_by_name():
    assert class_numbers(["b"], ["a", "b"]) == [1]
    assert class_numbers([], ["a", "b"]) == [0, 1]
    assert class_numbers(None, []) == []
    with pytest.raises(InputError, match="no class 'c'"):
        class_numbers(["c"], ["a", "b"])


@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_page_python_and_command_draw_the_same(shelf, runs, tmp_path, monkeypatch, guidance):
    monkeypatch.chdir(tmp_path)
    name = f"{runs.name}/plain"
    flow = shelf.flow(name)
    request = draw.requested(shelf.classes(name), ["3", "7"], 6, guidance, 0.9, "product", "standard", True, 5)
    drawing = draw.Drawing(name, request, "auto")
    parts = list(draw_batches(flow, request, range(6), "auto", draw.columns(6)))
    (tmp_path / "page").mkdir()
    files = draw.save(tmp_path / "page", parts)
    python, command = draw.texts(shelf.place(name), drawing, shelf.classes(name))
    exec(python.replace("samples.png", "python.npz"), {})
    assert main([*shlex.split(command)[1:], "-o", "command.npz"]) == 0
    page, by_python, by_command = (np.load(file)["arr_0"] for file in (files[1], "python.npz", "command.npz"))
    assert np.array_equal(by_python, by_command)
    assert np.abs(page.astype(int) - by_command.astype(int)).max() <= 1  # batches of another size: rounding
    z = load_file(files[2])
    assert z["z"].shape == (6, *flow.token_shape)
    assert z["labels"].tolist() == [3, 7] * 3


def test_classes_whose_names_are_other_numbers_are_named():
    assert "--labels=10,2" in draw.sample_command("run", Request(2, (1, 2)), "auto", "a.png", ["1", "10", "2"])


def test_fewer_images_than_classes_are_spread_as_the_command_spreads_them():
    names = [str(k) for k in range(10)]
    assert draw.requested(names, [], 3, 0, 1, "linear", "standard", True, 0).labels == (0, 4, 9)


def test_the_trajectory_ends_at_the_image(shelf, runs):
    flow, request = shelf.flow(f"{runs.name}/plain"), Request(4, (1, 2), seed=3, denoise=False)
    images = trajectory(flow, request, 2)
    assert len(images) == flow.config.blocks + 1
    (drawn,) = draw_batches(flow, request, [2])
    torch.testing.assert_close(images[-1:], drawn.x, atol=1e-5, rtol=0)


def test_images_alike_come_from_near_z(shelf, runs):
    flow, request = shelf.flow(f"{runs.name}/plain"), Request(4, (1, 2), seed=3, denoise=False)
    (drawn,) = draw_batches(flow, request, [2])
    near, far = (alike(flow, request, 2, share, 9, 3) for share in (0.001, 1.0))
    assert (to_uint8(near).int() - to_uint8(drawn.x).int()).abs().max() <= 3
    assert (far - drawn.x).abs().mean() > 10 * (near - drawn.x).abs().mean()
    again = alike(flow, request, 2, 1.0, 9, 3)
    assert torch.equal(far, again)


@pytest.mark.parametrize(
    "call", ["trajectory(flow, request, 2, method='auto')", "alike(flow, request, 2, 0.4, seed=1, num=3)"]
)
def test_what_is_done_with_one_image_is_shown_in_python(shelf, runs, call):
    name = f"{runs.name}/plain"
    drawing = draw.Drawing(name, Request(4, (1, 2), seed=3), "auto", 2)
    found: dict = {}
    exec(draw.texts_of_one(shelf.place(name), drawing, call)[0], found)
    expected = eval(call, {**found, "flow": shelf.flow(name), "request": drawing.request})
    torch.testing.assert_close(found["images"], expected, atol=1e-5, rtol=0)


def get(url, **headers):
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_no_file_of_the_server_can_be_read(server, runs):
    secret = runs / "notes" / "secret.txt"
    secret.write_text("do not tell")
    places = [str(secret), "/etc/passwd", f"{runs}/plain/config.yaml", "../../etc/passwd", f"/{Path.home()}/.bashrc"]
    for place in places:
        for route in ("gradio_api/file=", "file=", "gradio_api/stream/", "static/", "assets/", "gradio_api/file/"):
            for spelling in (place, place.replace("/", "%2F"), place.replace("..", "%2e%2e")):
                status, body = get(f"{server}/{route}{spelling}")
                assert status >= 400, (route, spelling)
                assert b"do not tell" not in body
                assert b"root:" not in body


def call(server, name, *values):
    """What an endpoint of the page answers to values that no page would send."""
    body = json.dumps({"data": list(values)}).encode()
    request = urllib.request.Request(f"{server}/gradio_api/call/{name}", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request) as answer:
            event = json.load(answer)["event_id"]
    except urllib.error.HTTPError as error:
        return error.read().decode()
    return get(f"{server}/gradio_api/call/{name}/{event}")[1].decode()


@pytest.mark.parametrize("place", ["/etc", "..", "runs/../../etc", NASTY, None, 3, ["a"], {"path": "/etc/passwd"}])
def test_flows_that_are_not_offered_are_refused(server, place):
    said = call(server, "draw", place, "auto", [], 4, 0, 1, True, 0)
    assert "event: error" in said or "error" in said.lower()
    assert "event: complete" not in said


@pytest.mark.parametrize(
    "values", [("auto", [], 10**9), ("auto", [], "4; ls"), ("no such", [], 4), ("auto", ["no such"], 4)]
)
def test_values_that_the_page_does_not_offer_are_refused(server, runs, values):
    said = call(server, "draw", f"{runs.name}/plain", *values, 0, 1, True, 0)
    assert "event: error" in said
    assert "event: complete" not in said


@pytest.fixture
def elsewhere():
    """An address of this machine that is none of the studio's, and what was asked there."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{other.server_port}/secret.png", asked
        other.shutdown()


def test_files_of_the_server_are_no_uploads_nor_is_what_it_reaches(server, runs, elsewhere):
    address, asked = elsewhere
    names = json.loads(get(f"{server}/gradio_api/info")[1])["named_endpoints"]
    taken = 0
    for name, endpoint in names.items():
        kinds = [parameter["python_type"]["type"] for parameter in endpoint["parameters"]]
        for place in (runs / "plain" / "config.yaml", "/etc/passwd", Path.home() / ".bashrc", address):
            for i, kind in enumerate(kinds):
                if "path" not in kind:
                    continue
                file = {"path": str(place), "url": address, "meta": {"_type": "gradio.FileData"}}
                values = [p.get("parameter_default") for p in endpoint["parameters"]]
                values[i] = [file] if kind.startswith("list") else file
                said = call(server, name.strip("/"), *values)
                assert "event: complete" not in said, (name, place)
                assert "root:" not in said
                taken += 1
    assert taken > 5
    assert asked == []


def test_foreign_pages_cannot_pass_for_it(server):
    """Not by a name that leads to this machine, and not by a form that is sent here."""
    assert get(f"{server}/config")[0] == 200
    assert get(f"{server}/config", Host="foreign.example")[0] == 400
    assert "event: complete" in call(server, "offered")
    body = json.dumps({"data": []}).encode()
    url = f"{server}/gradio_api/call/offered"
    sent = urllib.request.Request(url, body, {"Content-Type": "text/plain", "Origin": "http://foreign.example"})
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(sent)


def test_only_this_machine_is_served_unless_asked(runs):
    with Studio(Shelf([str(runs)], CPU), local=False) as studio:
        blocks = serve(studio, host="0.0.0.0", password="secret")
        try:
            url = blocks.local_url.rstrip("/")
            assert get(f"{url}/config")[0] == 401
            assert get(f"{url}/gradio_api/info")[0] == 401
        finally:
            blocks.close(verbose=False)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nothing/here"], "neither a folder nor a hub id|there is no folder"),
        (["--port=0"], "port must be from 1 to 65535"),
        (["--port=70000"], "port must be from 1 to 65535"),
        (["--device=abacus"], "device 'abacus' is not here"),
    ],
)
def test_bad_commands(runs, words, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["studio", *([] if "nothing" in words[0] else [str(runs)]), *words])
    assert stop.value.code == 2
    assert re.search(said, capsys.readouterr().err)
