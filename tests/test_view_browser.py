"""`surgery view` in a real browser: the graph shows, weights have their values, subgraphs can be entered."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import pytest
from browser import Browser, Element, chromium, missing
from test_view import serving

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

LOOP = """
<ir_version: 10, opset_import: ["" : 18]>
g (int64 trips, bool go, float[64] x) => (float[64] y) {
    [around] y = Loop (trips, go, x) <body = trip (int64 i, bool going, float[64] past) => (bool on, float[64] next) {
        on = Identity(going)
        [chosen] next = If (going) <
            then_branch = cached () => (float[64] a) { [product] a = MatMul(inner, past) },
            else_branch = plain () => (float[64] b) { b = Neg(past) }
        >
    }>
}
"""

INNER = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model with a weight in a branch in a loop; a node of the branch says which step made it."""
    model = onnx.parser.parse_model(LOOP)
    body = model.graph.node[0].attribute[0].g
    branch = body.node[1].attribute[0].g
    branch.node[0].metadata_props.add(key="surgery.made_by", value="step 3 merge_if")
    branch.initializer.append(onnx.numpy_helper.from_array(INNER, "inner"))
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.onnx_data")
    return tmp_path / "m.onnx"


def node(browser: Browser, name: str) -> Element:
    browser.find("body.default")  # a spinner lies over all else before
    return browser.find(f'g.graph-node[id="node-name-{name}"]')


def enter(browser: Browser, graph: str) -> None:
    """Press the button `Show Graph` of a branch or body."""
    node(browser, graph).find("g.node-item-type", "○").click()


def show(browser: Browser, name: str) -> Element:
    """Click a node and return the side bar with its properties."""
    node(browser, name).find("g.node-item-type").click()
    browser.find("#sidebar-title", "NODE PROPERTIES")
    return browser.find("#sidebar-content", name)


def show_values(sidebar: Element, weight: str) -> str:
    """Press the plus of a weight and return what the side bar says then."""
    sidebar.find(".sidebar-item-value", f"name: {weight}").find(".sidebar-item-value-expander", "+").click()
    sidebar.find(".sidebar-item-value", "location:")
    sidebar.find("pre")
    return sidebar.text


def first_values(text: str) -> list[float]:
    values = []
    for line in text.splitlines():
        try:
            values.append(float(line.strip(" ,")))
        except ValueError:
            continue
    return values


def test_subgraphs_are_entered_and_their_weights_have_values(browser: Browser, model: Path) -> None:
    with serving(model) as client:
        browser.open(client.server.url)
        enter(browser, "trip")
        enter(browser, "cached")
        sidebar = show(browser, "product")
        browser.find('.sidebar-item-name input[value="surgery.made_by"]')
        assert "step 3 merge_if" in sidebar.text
        said = show_values(sidebar, "inner")
        assert "location: m.onnx_data, bytes 0 to 16384" in said
        np.testing.assert_array_equal(np.float32(first_values(said)[:128]), INNER.reshape(-1)[:128])
        # And out again.
        browser.find(".toolbar-path-back-button").click()
        node(browser, "chosen")


def test_the_pages_talk_to_nobody_else_and_nothing_is_wrong(browser: Browser, model: Path) -> None:
    browser.requested(), browser.complaints()
    with serving(model) as client:
        browser.open(client.server.url)
        node(browser, "around")
        time.sleep(0.5)  # what Netron would send, it sends after a moment
        assert {url.startswith(client.server.url) for url in browser.requested()} == {True}
        assert browser.complaints() == []


def test_the_list_of_a_run_leads_to_its_steps(
    browser: Browser, model: Path, surgery: Callable[..., object], tmp_path: Path
) -> None:
    (tmp_path / "r.yaml").write_text("source: m.onnx\nsteps: [dedup_weights]\noutput: out\n")
    surgery("run", "r.yaml", "--keep-steps", "--no-check", cwd=tmp_path)
    with serving(tmp_path / "out.steps") as client:
        browser.open(client.server.url)
        browser.find("h2", "step 0 source")
        browser.find("tr", "1_dedup_weights.model.onnx").find("a").click()
        node(browser, "around")
        browser.open(client.server.url)
        browser.find("tr", "0_source.model.onnx").find("a").click()
        enter(browser, "trip")
        node(browser, "chosen")
        (tmp_path / "screen.png").write_bytes(browser.screenshot())


def test_without_its_data_file_the_graph_shows(browser: Browser, model: Path) -> None:
    model.with_name("m.onnx_data").unlink()
    with serving(model) as client:
        browser.open(client.server.url)
        enter(browser, "trip")
        enter(browser, "cached")
        sidebar = show(browser, "product")
        assert first_values(show_values(sidebar, "inner")) == []
