"""The report of `audit_ranges`: which tensors need float32 and why, as `keep:`, as a table, and as a page."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from browser import Browser, chromium, missing
from models import generic, single
from ruamel.yaml import YAML

from passes.audit_ranges import AuditRanges, Ranges
from passes.audit_ranges.page import page
from passes.audit_ranges.reporting import Found, Measured, findings, keep_yaml, kept, summary_text
from passes.cast_fp16 import CastFp16
from surgery import Bundle, Check, Pipeline
from surgery.errors import RecipeError
from surgery.text import parse


def found_in(model: str | ir.Model, folder: Path, **inputs: object) -> Found:
    """Return what an audit finds of a model, on one sample."""
    np.savez(folder / "x.npz", **{name: np.asarray(value) for name, value in inputs.items()})
    bundle = single(model) if isinstance(model, str) else Bundle({"model": model})
    audit = AuditRanges(data=folder / "x.npz", save_to=folder / "ranges")
    with Pipeline([audit], None).run(bundle):
        pass
    models = bundle.clone().models  # in which nodes without a name have one, as in the run
    ranges = Ranges.load(folder / "ranges" / "model.ranges.json", models["model"])
    (found,) = findings(models, {"model": ranges})
    return found


def reasons(found: Found) -> dict[str, str]:
    return {one.key: one.reason.text for one in found.tensors if one.reason is not None}


def x(*numbers: float) -> np.ndarray:
    return np.array([numbers], np.float32)


def test_what_peaks_too_high_is_kept_with_what_reads_it(tmp_path: Path) -> None:
    found = found_in(
        """
        <ir_version: 8, opset_import: ["" : 18]>
        g (float[n, 3] x) => (int64[n, 1] y, float[n, 3] z) {
            [square] large = Mul(x, x)
            [place] y = ArgMax <axis = -1> (large)
            [other] z = Neg(x)
        }
        """,
        tmp_path,
        x=x(1, -285, 3),
    )
    assert reasons(found) == {"large": "peaks at 81,225, above 0.5 x 65,504"}
    assert keep_yaml([found]) == (
        "keep:\n"
        "  # outside of layers\n"
        "  - square  # model: peaks at 81,225, above 0.5 x 65,504\n"
        "  - place  # model: reads square\n"
    )


def test_half_of_the_range_is_headroom(tmp_path: Path) -> None:
    text = '<ir_version: 8, opset_import: ["" : 18]> g (float[n, 1] x) => (float[n, 1] y) { y = Neg(x) }'
    assert reasons(found_in(text, tmp_path, x=x(32752))) == {}
    assert set(reasons(found_in(text, tmp_path, x=x(32753)))) == {"x", "y"}


def test_where_nothing_is_wrong_nothing_is_kept(tmp_path: Path) -> None:
    text = '<ir_version: 8, opset_import: ["" : 18]> g (float[n, 2] x) => (float[n, 2] y) { y = Softmax(x) }'
    found = found_in(text, tmp_path, x=x(-40, 40))
    assert found.tensors[-1].range.underflow  # e**-80, a tiny share, is no reason
    assert keep_yaml([found]) == "keep: []\n"
    assert "2 tensors on 1 sample; all fit float16" in summary_text([found])


@pytest.mark.parametrize("lowest", ["-3.4028234663852886e38", "-inf"])
def test_a_mask_needs_no_float32_nor_do_biases_that_are_added_to_it(tmp_path: Path, lowest: str) -> None:
    found = found_in(
        f"""
        <ir_version: 8, opset_import: ["" : 18]>
        g (int64[n, 3] seen, float[n, 3] scores) => (float[n, 3] y) {{
            no = Constant <value = float {{{lowest}}}> ()
            is_seen = Cast <to = 9> (seen)
            masked = Where(is_seen, scores, no)
            y = Softmax(masked)
        }}
        """,
        tmp_path,
        seen=[[1, 0, 1]],
        scores=x(1, 2, 3),
    )
    assert reasons(found) == {}
    assert found.not_finite == ()


def test_numbers_that_vanish_before_they_are_divided_by_are_a_reason_and_others_are_not(tmp_path: Path) -> None:
    found = found_in(
        """
        <ir_version: 8, opset_import: ["" : 18]>
        g (float[n, 2] x) => (float[n, 2] y, float[n, 2] z) {
            small = Mul(x, x)
            y = Div(x, small)
            tiny = Mul(x, x)
            z = Add(x, tiny)
        }
        """,
        tmp_path,
        x=x(1e-4, 1),
    )
    assert reasons(found)["small"] == "1 number vanishes, down to 1e-08, before Div"
    assert "tiny" not in reasons(found)


def test_whole_numbers_of_positions_above_2048_are_a_reason(tmp_path: Path) -> None:
    text = """
        <ir_version: 8, opset_import: ["" : 18]>
        g (int64[n, 1] position_ids, float[n, 1] x) => (float[n, 1] y) {
            counted = Cast <to = 1> (position_ids)
            y = Add(counted, x)
        }
    """
    assert reasons(found_in(text, tmp_path, position_ids=[[2048]], x=x(1))) == {}
    found = found_in(text, tmp_path, position_ids=[[2049]], x=x(1))
    assert reasons(found)["counted"] == "counts to 2,049, above 2,048"


def test_a_node_that_half_precision_breaks_inside_is_kept_alone(tmp_path: Path) -> None:
    found = found_in(
        """
        <ir_version: 8, opset_import: ["" : 18]>
        g (float[n, 2] x) => (float[n, 2] y) {
            shrunk = Mul(x, x)
            [lost] less = Sub(x, shrunk)
            y = Neg(less)
        }
        """,
        tmp_path,
        x=x(4097 / 4096, 0.0001),
    )
    share = reasons(found)["less"]
    assert share.startswith("half precision alone is off by ")
    assert [one.entry for one in kept([found])] == ["lost"]


BRANCHES = """
<ir_version: 8, opset_import: ["" : 18]>
g (bool go, float[n] x) => (float[n] y) {
    [choice] y = If (go) <
        then_branch = high () => (float[n] a) { [grow] a = Mul(x, x) },
        else_branch = low () => (float[n] b) { [stay] b = Neg(x) }
    >
}
"""


def test_in_a_branch_the_node_is_kept_and_not_what_holds_the_branch(tmp_path: Path) -> None:
    found = found_in(BRANCHES, tmp_path, go=True, x=np.array([300], np.float32))
    assert reasons(found).keys() == {"choice.then_branch/a", "y"}
    assert [one.entry for one in kept([found])] == ["grow"]
    assert [one.layer for one in found.tensors if one.key == "choice.then_branch/a"] == [
        "choice.then_branch/outside of layers"
    ]


def test_a_branch_that_no_sample_took_is_said(tmp_path: Path) -> None:
    found = found_in(BRANCHES, tmp_path, go=False, x=np.array([300], np.float32))
    assert found.unseen == ("choice.then_branch/a",)
    assert "all fit float16; 1 never computed" in summary_text([found])
    assert "<li>choice.then_branch/a</li>" in page([found], "branches")


def test_the_ledger_says_what_was_found(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=x(1, 2, 3, 300))
    with Pipeline([AuditRanges(data=tmp_path / "x.npz")]).run(generic()) as result:
        assert result.records[-1].change.summary == "model: 3 tensors on 1 sample; 1 too large"
        assert result.records[-1].change.count == 0


STRANGE = ("a[0]*?", "yes: no #", "<script>alert(1)", '"quoted"\\', "null", "123", "- a", "t\tab", "ö")


def strange_model() -> ir.Model:
    """Return a model of nodes with strange names, each of which peaks too high."""
    lines = "\n".join(f"v{index + 1} = Mul(v{index}, two)" for index in range(len(STRANGE)))
    model = parse(f"""
        <ir_version: 8, opset_import: ["" : 18]>
        g (float[n] v0) => (float[n] v{len(STRANGE)}) <float two = {{2}}> {{ {lines} }}
    """)
    for node, name in zip(model.graph, STRANGE, strict=True):
        node.name = name
    return model


def test_any_name_survives_yaml_and_matches_itself_alone(tmp_path: Path) -> None:
    found = found_in(strange_model(), tmp_path, v0=np.array([60000], np.float32))
    entries = YAML(typ="safe").load(keep_yaml([found]))["keep"]
    meant = [[name for name in STRANGE if fnmatch.fnmatchcase(name, entry)] for entry in entries]
    assert sorted(meant) == sorted([name] for name in STRANGE)


def test_cast_fp16_takes_what_the_report_would_keep(tmp_path: Path) -> None:
    found = found_in(strange_model(), tmp_path, v0=np.array([60000], np.float32))
    entries = tuple(YAML(typ="safe").load(keep_yaml([found]))["keep"])
    np.savez(tmp_path / "x.npz", v0=np.array([1], np.float32))
    for keep, is_cast in ((entries, False), (entries[:-1], True), ((), True)):
        steps = [AuditRanges(data=tmp_path / "x.npz"), CastFp16(keep=keep)]
        with Pipeline(steps, None).run(Bundle({"model": strange_model()})) as result:
            assert bool(result.records[-1].change.count) == is_cast


def test_a_node_without_a_name_is_kept_by_its_output(tmp_path: Path) -> None:
    model = strange_model()
    for node in model.graph:
        node.name = ""
    found = found_in(model, tmp_path, v0=np.array([60000], np.float32))
    assert [one.entry for one in kept([found])] == [f"v{index + 1}" for index in range(len(STRANGE))]


def test_layers_are_read_off_names(tmp_path: Path) -> None:
    model = parse("""
        <ir_version: 8, opset_import: ["" : 18]>
        g (float[n] x) => (float[n] d) { a = Neg(x) b = Neg(a) c = Neg(b) d = Neg(c) }
    """)
    names = ("/model/layers.3/mlp/Neg", "model.layers.3.attention/Neg", "decoder.block.2.layer.0/Neg", "Neg_3")
    for node, name in zip(model.graph, names, strict=True):
        node.name = name
    found = found_in(model, tmp_path, x=np.array([1], np.float32))
    assert list(found.layers) == ["inputs", "model.layers.3", "decoder.block.2", "outside of layers"]


def test_models_with_one_reason_share_a_line_which_says_the_worst(tmp_path: Path) -> None:
    text = '<ir_version: 8, opset_import: ["" : 18]> g (float[n, 1] x) => (float[n, 1] y) { [twice] y = Add(x, x) }'
    one, other = (found_in(text, tmp_path, x=x(peak)) for peak in (20000, 25000))
    both = [Found("prefill", 1, one.tensors), Found("decode", 1, other.tensors)]
    assert "  - twice  # prefill, decode: peaks at 50,000, above 0.5 x 65,504\n" in keep_yaml(both)


def test_what_is_not_finite_in_float32_is_said(tmp_path: Path) -> None:
    text = '<ir_version: 8, opset_import: ["" : 18]> g (float[n, 2] x) => (float[n, 2] y) { y = Log(x) }'
    found = found_in(text, tmp_path, x=x(-1, 2))
    assert [one.key for one in found.not_finite] == ["y"]
    assert "1 not finite in float32" in summary_text([found])


class _Outline(HTMLParser):
    """Proves that every tag is closed in its turn, and counts them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.counts: dict[str, int] = {}
        self.addresses: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.addresses += [value or "" for name, value in attrs if name in ("href", "src")]
        if tag not in ("meta", "input", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.addresses += [value or "" for name, value in attrs if name in ("href", "src")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_page_is_whole_refers_to_nothing_outside_and_runs_no_name(tmp_path: Path) -> None:
    found = found_in(strange_model(), tmp_path, v0=np.array([60000], np.float32))
    text = page([found], "<b>")
    outline = _Outline(text)
    assert outline.counts["script"] == 1
    assert "b" not in outline.counts
    assert {address[0] for address in outline.addresses} == {"#"}
    assert page([found], "<b>") == text


def many(folder: Path, count: int) -> Found:
    """Return a model of many layers, measured once and multiplied."""
    text = '<ir_version: 8, opset_import: ["" : 18]> g (float[n, 2] x) => (float[n, 2] y) { [n] y = Mul(x, x) }'
    _, measured = found_in(text, folder, x=x(0.001, 300)).tensors
    tensors = tuple(
        Measured("model", f"v{index}", f"h.{index // 30}", measured.range, measured.node, (), measured.reason)
        for index in range(count)
    )
    return Found("model", 1, tensors)


def test_a_page_of_1500_tensors_has_a_row_for_each_and_stays_small(tmp_path: Path) -> None:
    text = page([many(tmp_path, 1500)], "many")
    assert text.count('class="needs"') == 200 + 1500  # among the worst, and in its layer
    assert "1,300 more are below" in text
    assert len(text) < 4_000_000


def test_one_option_writes_every_form(tmp_path: Path) -> None:
    bundle = single('<ir_version: 8, opset_import: ["" : 18]> g (float[n, 4] x) => (float[n, 4] y) { y = Exp(x) }')
    files = tuple(tmp_path / "deep" / name for name in ("r.html", "r.txt", "keep.yaml"))
    with Pipeline([AuditRanges(report=files, rounds=1)], Check()).run(bundle):
        pass
    assert _Outline(files[0].read_text()).counts["h1"] == 1
    assert files[1].read_text().startswith("model: 2 tensors on ")
    assert YAML(typ="safe").load(files[2]) == {"keep": []}


def test_a_report_of_unknown_form_is_a_mistake_of_the_recipe() -> None:
    with pytest.raises(RecipeError, match="report: r.pdf is of no known form"):
        AuditRanges(report=Path("r.pdf"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if missing():
        pytest.skip(missing())
    with chromium() as browser:
        yield browser


def test_in_a_browser_rows_are_searched_and_ordered(browser: Browser, tmp_path: Path) -> None:
    found = found_in(strange_model(), tmp_path, v0=np.array([30000], np.float32))
    (tmp_path / "r.html").write_text(page([found], "strange"))
    browser.requested(), browser.complaints()
    browser.open((tmp_path / "r.html").as_uri())
    browser.find("h1", "Ranges of strange")
    all_rows = "[...document.querySelectorAll('.layer-of tbody tr')]"
    rows = f"return {all_rows}.filter(row => !row.hidden).map(row => row.cells[0].textContent)"

    def shown() -> list[str]:
        return list(browser.ask("POST", "/execute/sync", {"script": rows, "args": []}))

    def act(script: str) -> None:
        browser.ask("POST", "/execute/sync", {"script": script, "args": []})

    assert sorted(shown()) == sorted(["v0", *STRANGE])
    act("word.value = 'script'; word.dispatchEvent(new Event('input'))")
    assert shown() == [STRANGE[2]]
    act("word.value = ''; order.value = 'peak'; order.dispatchEvent(new Event('input'))")
    assert shown()[:2] == ["v0", "ö"]  # layer by layer
    act("only.checked = true; only.dispatchEvent(new Event('input'))")
    assert "v0" not in shown()
    assert [url for url in browser.requested() if not url.startswith("file:")] == []
    assert browser.complaints() == []
