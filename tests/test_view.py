"""`surgery view` without a browser: what is listed, what is served, what is refused, how it ends."""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from urllib.parse import parse_qs, quote, urljoin, urlsplit

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import onnx.parser
import onnx_ir as ir
import pytest

pytest.importorskip("netron", reason="netron is not installed: pip install 'graph-surgery[view]'")

from surgery.errors import ModelFileError, RecipeError
from surgery.viewer.exhibit import exhibit
from surgery.viewer.listing import list_models
from surgery.viewer.server import Gallery, Server

Run = Callable[..., subprocess.CompletedProcess[str]]

BRANCHES = (
    """
<ir_version: 10, opset_import: ["" : 18], producer_name: "somebody">
g (bool use_cache, float[batch, 64] x) => (float[batch, 64] y) <float scale = {2}> {
    c = Constant <value = float[64] {ROW}> ()
    [doubled] t = MatMul(x, w)
    h = If (use_cache) <
        then_branch = cached () => (float[batch, 64] a) { i = MatMul(t, inner) a = Add(i, c) },
        else_branch = plain () => (float[batch, 64] b) { b = Mul(t, scale) }
    >
    y = Relu(h)
}
""".replace("ROW", "{" + ", ".join(["1"] * 64) + "}")
    .replace("{{", "{")
    .replace("}}", "}")
)


def branches(path: Path, *, seed: int = 0, **saving: object) -> onnx.ModelProto:
    """Write a model with weights outside and inside a branch, and one too small to be fetched; return what it is."""
    model = onnx.parser.parse_model(BRANCHES)
    random = np.random.default_rng(seed)
    body = next(node for node in model.graph.node if node.op_type == "If").attribute[0].g
    for graph, name in ((model.graph, "w"), (body, "inner")):
        weight = random.standard_normal((64, 64)).astype(np.float32)
        graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
    model.graph.node[1].metadata_props.add(key="surgery.made_by", value="step 1 merge_if")
    whole = plain(model)
    onnx.save(model, path, **saving)
    return whole


def plain(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model as onnx_ir writes it: with types of initializers, and values in one of the forms there are."""
    return ir.serde.serialize_model(ir.serde.deserialize_model(model))


class Client:
    """Asks a server for pages as a browser does, but for the clean-up of paths that browsers do."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.said: list[str] = []

    def get(self, path: str, *, host: str = "localhost") -> tuple[int, bytes, Mapping[str, str]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=30)
        try:
            connection.putrequest("GET", path, skip_host=True)
            connection.putheader("Host", f"{host}:{self.server.port}")
            connection.endheaders()
            response = connection.getresponse()
            return response.status, response.read(), dict(response.getheaders())
        finally:
            connection.close()

    def page(self, path: str) -> str:
        status, content, _ = self.get(path)
        assert status == 200, (path, status, content)
        return content.decode()

    def netron_query(self, path: str) -> dict[str, str]:
        """Follow a link of the list to Netron's page, and return what that is asked to show."""
        status, _, headers = self.get(path)
        assert status == 302
        assert "Netron" in self.page(headers["Location"])
        return {name: values[0] for name, values in parse_qs(urlsplit(headers["Location"]).query).items()}

    def shown(self, path: str = "/") -> onnx.ModelProto:
        """Return the model that Netron is given by a link, with its weights fetched as Netron does."""
        graph = urljoin("/netron/", self.netron_query(path)["url"])
        model = onnx.ModelProto.FromString(self.get(graph)[1])
        for tensor in external(model):
            reference = {entry.key: entry.value for entry in tensor.external_data}
            status, content, _ = self.get(quote(f"{graph.rpartition('/')[0]}/{reference['location']}", safe="/%"))
            assert status == 200
            assert reference["offset"] == "0"
            assert int(reference["length"]) == len(content)
            tensor.raw_data = content
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
        return plain(model)


def external(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    graphs = [model.graph, *(attribute.g for node in model.graph.node for attribute in node.attribute)]
    tensors = [tensor for graph in graphs for tensor in graph.initializer]
    return [tensor for tensor in tensors if tensor.data_location == onnx.TensorProto.EXTERNAL]


@contextmanager
def serving(path: Path) -> Iterator[Client]:
    said: list[str] = []
    with Server(Gallery(path, said.append), "localhost", 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        client = Client(server)
        client.said = said
        try:
            yield client
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def viewing(path: Path, *options: str, environment: Mapping[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    """Run the command until the block ends."""
    process = subprocess.Popen(
        [sys.executable, "-m", "surgery", "view", path, "--port", "0", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # A shell starts what it puts into the background with SIGINT ignored, and then Python ignores it too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def run_folder(tmp_path: Path, surgery: Run) -> Path:
    """What `surgery run --keep-steps` writes: OUT, and beside it OUT.steps."""
    branches(tmp_path / "branches.onnx")
    (tmp_path / "r.yaml").write_text("source: branches.onnx\nsteps: [dedup_weights]\noutput: out\n")
    done = surgery("run", "r.yaml", "--keep-steps", "--no-check", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return tmp_path / "out"


def headings(path: Path) -> list[tuple[str, str, list[str]]]:
    return [
        (section.heading, section.note, [model.address for model in section.models]) for section in list_models(path)
    ]


# What is listed.


def test_the_steps_of_a_run_are_listed_with_what_each_did(run_folder: Path) -> None:
    steps = [
        ("step 0 source", "", ["0_source.model.onnx"]),
        ("step 1 dedup_weights", "", ["1_dedup_weights.model.onnx"]),
    ]
    assert headings(run_folder.with_name("out.steps")) == steps
    of_out = [(heading, note, [f"out.steps/{name}" for name in names]) for heading, note, names in steps]
    assert headings(run_folder) == [("", "", ["model.onnx"]), *of_out]
    report = run_folder / "report.json"
    report.write_text(report.read_text().replace('"summary": ""', '"summary": "shared 1 weight"'))
    assert [note for _, note, _ in headings(run_folder.with_name("out.steps"))] == ["shared 1 weight"] * 2


def test_steps_of_another_run_are_not_listed_with_a_result(run_folder: Path) -> None:
    report = run_folder / "report.json"
    report.write_text(report.read_text().replace("dedup_weights", "clean_casts"))
    assert headings(run_folder) == [("", "", ["model.onnx"])]
    assert len(headings(run_folder.with_name("out.steps"))) == 2
    report.write_text("not JSON")
    assert headings(run_folder) == [("", "", ["model.onnx"])]


def test_models_are_listed_in_the_order_of_steps_and_roles(tmp_path: Path) -> None:
    for name in ("10_b.decode", "10_b.prefill", "2_a.decode", "2_a.prefill", "2_a.encoder"):
        (tmp_path / f"{name}.onnx").touch()
    assert headings(tmp_path) == [
        ("step 2 a", "", ["2_a.encoder.onnx", "2_a.prefill.onnx", "2_a.decode.onnx"]),
        ("step 10 b", "", ["10_b.prefill.onnx", "10_b.decode.onnx"]),
    ]


def test_a_folder_is_listed_with_its_folder_onnx(tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    (tmp_path / "other").mkdir()
    for name in ("a.onnx", "onnx/decoder_model.onnx", "other/b.onnx", "a.onnx_data", "0_step.decode.onnx"):
        (tmp_path / name).touch()
    assert headings(tmp_path) == [("", "", ["a.onnx", "0_step.decode.onnx", "onnx/decoder_model.onnx"])]
    assert [model.role for model in list_models(tmp_path)[0].models] == ["a", "decode", "prefill"]


def test_a_folder_without_models_says_where_there_are_some(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(RecipeError, match=r"no \.onnx file is in this folder\n  try: give an \.onnx file"):
        list_models(tmp_path)
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "a.onnx").touch()
    with pytest.raises(RecipeError, match="try: one of its folders with models: exported"):
        list_models(tmp_path)


# What is served.


@pytest.mark.parametrize("is_external", [False, True])
def test_netron_gets_the_model_as_it_is_with_every_weight(tmp_path: Path, is_external: bool) -> None:
    saving = {"save_as_external_data": True, "location": "m.onnx_data"} if is_external else {}
    whole = branches(tmp_path / "m.onnx", **saving)
    with serving(tmp_path / "m.onnx") as client:
        assert client.shown() == whole
        assert client.said == []


def test_a_graph_is_sent_without_its_weights_and_a_small_weight_with_it(tmp_path: Path) -> None:
    branches(tmp_path / "m.onnx")
    shown = exhibit(tmp_path / "m.onnx")
    model = onnx.ModelProto.FromString(shown.graph)
    assert [tensor.name for tensor in external(model)] == ["w", "inner"]
    assert len(shown.graph) < 64 * 64 * 4
    where = {tensor.name: tensor.external_data[0].value for tensor in external(model)}
    assert re.fullmatch(r"m\.onnx, bytes (\d+) to (\d+)", where["w"])
    assert (tmp_path / "m.onnx").read_bytes().find(shown.weights[where["w"]].read(0, 1 << 20)) == int(
        where["w"].split()[2]
    )


def test_a_constants_value_is_fetched_and_a_functions_is_not(tmp_path: Path) -> None:
    weight = onnx.numpy_helper.from_array(np.arange(1024, dtype=np.float32), "c")
    constant = onnx.helper.make_node("Constant", [], ["c"], value=weight)
    relu = onnx.helper.make_node("Relu", ["c"], ["y"])
    call = onnx.helper.make_node("made", [], ["z"], domain="mine")
    made = onnx.helper.make_function("mine", "made", [], ["y"], [constant, relu], [onnx.helper.make_opsetid("", 18)])
    graph = onnx.helper.make_graph([constant, relu, call], "g", [], [])
    imports = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("mine", 1)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=imports, functions=[made]), tmp_path / "m.onnx")
    shown = exhibit(tmp_path / "m.onnx")
    model = onnx.ModelProto.FromString(shown.graph)
    outside, inside = model.graph.node[0].attribute[0].t, model.functions[0].node[0].attribute[0].t
    assert shown.weights[outside.external_data[0].value].read(0, 4096) == weight.raw_data == inside.raw_data


def test_data_files_of_one_name_in_two_folders_are_told_apart(tmp_path: Path) -> None:
    model = onnx.parser.parse_model('<ir_version: 10, opset_import: ["" : 18]> g (float[2,512] x) => () {}')
    for name, value in (("one", b"\1"), ("two", b"\2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "w#1.bin").write_bytes(value * 2048)
        tensor = model.graph.initializer.add(name=name, data_type=1, dims=[512], data_location=1)
        tensor.external_data.add(key="location", value=f"{name}/w#1.bin")
    onnx.save(model, tmp_path / "m.onnx")
    with serving(tmp_path) as client:
        one, two = client.shown().graph.initializer
    assert (one.raw_data, two.raw_data) == (b"\1" * 2048, b"\2" * 2048)


def test_a_list_leads_to_every_model(run_folder: Path) -> None:
    with serving(run_folder) as client:
        page = client.page("/")
        links = re.findall(r'href="(/open/[^"]+)"', page)
        assert len(links) == 3
        assert [client.netron_query(link)["identifier"] for link in links] == [
            "model.onnx",
            "0_source.model.onnx",
            "1_dedup_weights.model.onnx",
        ]
        source, final = client.shown(links[1]), client.shown(links[0])
        assert [tensor.name for tensor in source.graph.initializer] == [
            tensor.name for tensor in final.graph.initializer
        ]
        assert page.count("weights.onnx_data, ") == 1
        assert "<h2>step 1 dedup_weights</h2>" in page


def test_odd_names_are_shown_as_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "a b#c%41"
    folder.mkdir()
    whole = branches(folder / "x? <b>&amp;%2F.onnx")
    (folder / "plain.onnx").write_bytes((folder / "x? <b>&amp;%2F.onnx").read_bytes())
    with serving(folder) as client:
        page = client.page("/")
        assert "<b>" not in page
        assert "x? &lt;b&gt;&amp;amp;%2F.onnx" in page
        link = next(link for link in re.findall(r'href="(/open/[^"]+)"', page) if "plain" not in link)
        assert client.netron_query(link)["identifier"] == "x? <b>&amp;%2F.onnx"
        assert client.shown(link) == whole


def test_a_model_that_was_saved_again_is_shown_anew(tmp_path: Path) -> None:
    first = branches(tmp_path / "m.onnx")
    with serving(tmp_path) as client:
        assert client.shown() == first
        second = branches(tmp_path / "new.onnx", seed=1)
        (tmp_path / "new.onnx").replace(tmp_path / "m.onnx")
        assert client.shown() == second != first


def test_without_its_data_file_a_graph_is_shown_all_the_same(tmp_path: Path) -> None:
    branches(tmp_path / "m.onnx", save_as_external_data=True, location="m.onnx_data")
    (tmp_path / "m.onnx_data").unlink()
    with serving(tmp_path) as client:
        graph = urljoin("/netron/", client.netron_query("/")["url"])
        assert client.get(graph)[1] == (tmp_path / "m.onnx").read_bytes()
        assert client.get("/models/m.onnx/m.onnx_data")[0] == 404
        assert len(client.said) == 1
        assert "m.onnx: shown as it is, without external weights:" in client.said[0]
        assert "its data file 'm.onnx_data' is missing" in client.said[0]


def test_a_broken_model_is_said_and_the_others_are_shown(tmp_path: Path) -> None:
    whole = branches(tmp_path / "good.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ModelFileError, match="is a Git LFS pointer"):
        exhibit(tmp_path / "bad.onnx")
    with serving(tmp_path) as client:
        status, content, _ = client.get("/open/bad.onnx")
        assert status == 422
        assert b"is a Git LFS pointer" in content
        assert client.shown("/open/good.onnx") == whole


# What is not served.


@pytest.mark.parametrize(
    "path",
    [
        "/secret.txt",
        "/netron/../secret.txt",
        "/netron/..%2F..%2Fsecret.txt",
        "/netron/server.py",
        "/netron/__init__.py",
        "/netron",
        "/open/secret.txt",
        "/open/..%2Fmodels%2Fm.onnx",
        "/models/m.onnx/m.onnx",
        "/models/m.onnx/m.onnx_data",
        "/models/m.onnx/..%2Fsecret.txt",
        "/models/m.onnx/..%2F..%2Foutside.onnx",
        "/models/..%2Foutside.onnx/graph",
        "/models/secret.txt/graph",
        "//etc/passwd",
        "/data/secret.txt",
        "/models/m.onnx/graph/",
    ],
)
def test_nothing_but_pages_graphs_and_weights_is_served(tmp_path: Path, path: str) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    branches(folder / "m.onnx", save_as_external_data=True, location="m.onnx_data")
    branches(tmp_path / "outside.onnx")
    (folder / "secret.txt").write_text("secret")
    with serving(folder) as client:
        status, content, _ = client.get(path)
        assert status == 404
        assert b"secret" not in content


def test_a_weight_outside_the_models_folder_is_not_served(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"s" * 64 * 64 * 4)
    folder = tmp_path / "models"
    folder.mkdir()
    branches(folder / "m.onnx", save_as_external_data=True, location="data")
    moved = onnx.load(folder / "m.onnx", load_external_data=False)
    for entry in moved.graph.initializer[-1].external_data:
        entry.value = "../secret" if entry.key == "location" else entry.value
    (folder / "m.onnx").write_bytes(moved.SerializeToString())
    with serving(folder) as client:
        client.netron_query("/")
        assert "leaves the model's folder" in client.said[0]
        for name in ("..%2Fsecret", "secret", "../secret", "secret, bytes 0 to 16384"):
            assert client.get(f"/models/m.onnx/{quote(name, safe='/%.')}")[0] == 404


def test_a_web_site_that_took_this_machines_address_is_refused(tmp_path: Path) -> None:
    branches(tmp_path / "m.onnx")
    with serving(tmp_path) as client:
        assert client.get("/models/m.onnx/graph")[0] == 200
        assert client.get("/models/m.onnx/graph", host="127.0.0.1")[0] == 200
        status, content, _ = client.get("/models/m.onnx/graph", host="evil.example")
        assert status == 403
        assert client.server.url.encode() in content


def test_netron_calls_nobody_and_does_not_expire(tmp_path: Path) -> None:
    branches(tmp_path / "m.onnx")
    # What this is about is still in the Netron that is installed.
    assert b"'0.0.0'" in files("netron").joinpath("browser.js").read_bytes()
    assert b'<meta name="date"' in files("netron").joinpath("index.html").read_bytes()
    with serving(tmp_path) as client:
        status, content, headers = client.get("/netron/")
    assert status == 200
    assert b'<meta name="version" content="0.0.0">' in content
    assert b'name="date"' not in content
    assert headers["Content-Security-Policy"].startswith("default-src 'self';")
    assert "connect-src" not in headers["Content-Security-Policy"]
    assert headers["Set-Cookie"].startswith("consent=")
    assert "Path=/netron/" in headers["Set-Cookie"]


# The command.


def test_the_command_says_the_address_and_ends_with_an_interrupt(tmp_path: Path) -> None:
    whole = branches(tmp_path / "m.onnx")
    nowhere = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "WAYLAND_DISPLAY")}
    nowhere.pop("BROWSER", None)
    with viewing(tmp_path / "m.onnx", environment=nowhere) as process:
        assert process.stdout is not None
        match = re.fullmatch(r"m\.onnx: http://localhost:(\d+)/\n", process.stdout.readline())
        assert match is not None
        port = match[1]
        if sys.platform == "linux":
            assert f"ssh -L {port}:localhost:{port} " in process.stdout.readline()
        assert process.stdout.readline() == "Ctrl-C ends it\n"
        connection = http.client.HTTPConnection("localhost", int(port), timeout=30)
        connection.request("GET", "/models/m.onnx/graph")
        assert onnx.ModelProto.FromString(connection.getresponse().read()).graph.node[1] == whole.graph.node[1]
        process.send_signal(signal.SIGINT)
        said, errors = process.communicate(timeout=30)
    assert (process.returncode, said, errors) == (0, "stopped\n", "")


def test_a_browser_is_opened_where_there_is_one_and_not_unasked(tmp_path: Path) -> None:
    branches(tmp_path / "m.onnx")
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" >> "{tmp_path / "opened"}"\n')
    browser.chmod(0o755)
    environment = {**os.environ, "BROWSER": f"{browser} %s"}
    with viewing(tmp_path / "m.onnx", "--no-browser", environment=environment) as process:
        assert process.stdout is not None
        while process.stdout.readline() != "Ctrl-C ends it\n":
            assert process.poll() is None
    assert not (tmp_path / "opened").exists()
    with viewing(tmp_path / "m.onnx", environment=environment) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        assert process.stdout.readline() == "Ctrl-C ends it\n"
    assert (tmp_path / "opened").read_text().strip() == first.split()[-1]


def test_listening_to_all_is_warned_of(tmp_path: Path) -> None:
    branches(tmp_path / "m.onnx")
    with viewing(tmp_path / "m.onnx", "--host", "0.0.0.0", "--no-browser") as process:
        assert process.stdout is not None
        assert re.fullmatch(r"m\.onnx: http://localhost:\d+/\n", process.stdout.readline())
        assert re.match(r"warning: whoever reaches port \d+ of .+ can read these models", process.stdout.readline())


def test_a_port_in_use_and_a_host_elsewhere_are_said(tmp_path: Path, surgery: Run) -> None:
    branches(tmp_path / "m.onnx")
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
        done = surgery("view", "m.onnx", "--no-browser", "--port", str(port), cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: port {port} of localhost is in use\n  try: another --port, or --port 0, which takes any free one\n"
    )
    # An address that is kept for documentation, RFC 5737.
    done = surgery("view", "m.onnx", "--no-browser", "--host", "192.0.2.1", "--port", "0", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot listen at 192.0.2.1, port 0: ")


def test_bad_input_is_said_in_a_sentence(tmp_path: Path, surgery: Run) -> None:
    (tmp_path / "text.onnx").write_text("not a model")
    for name, code, said in (("gone.onnx", 2, "gone.onnx: no such file or folder"), ("text.onnx", 3, "text.onnx: ")):
        done = surgery("view", name, "--no-browser", "--port", "0", cwd=tmp_path)
        assert done.returncode == code
        assert done.stderr.startswith(f"error: {said}")
        assert "Traceback" not in done.stderr


def test_without_netron_it_is_said_how_to_get_it(tmp_path: Path) -> None:
    branches(tmp_path / "m.onnx")
    code = (
        "import sys; sys.modules['netron'] = None; sys.argv = ['surgery', 'view', 'm.onnx', '--no-browser']\n"
        "import runpy; runpy.run_module('surgery', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "error: netron is not installed\n  try: pip install 'graph-surgery[view]'\n"
