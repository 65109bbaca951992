"""The explain report: its keys, its figures, its text and its page."""

import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from cascades import CASES, traced
from einfall.compiler.figures import byte_count, duration, quantity
from einfall.compiler.passes import make_plan
from einfall.compiler.report import explain
from einfall.ir.cascade import Einsum
from einfall.ir.errors import CascadeError
from einfall.ir.expr import Const, Op, Tile, aligned
from einfall.ir.plan import Correction, Domain, KernelPlan, Origin, Plan, Rejected, Stage, State, Value
from einfall.ir.text import parse_cascade
from einfall.schedules.target import load_target
from hypothesis import given, settings
from strategies import cascades

ATTENTION = """
cascade attention(Q[b,m,e], K[b,p,e], V[b,p,f], scale: f32) -> O[b,m,f]
  S0[b,m,p] = sum(e) Q[b,m,e] * K[b,p,e]
  S[b,m,p] = S0[b,m,p] * scale
  M[b,m] = max(p) S[b,m,p]
  N[b,m,p] = exp(S[b,m,p] - M[b,m])
  D[b,m] = sum(p) N[b,m,p]
  P[b,m,p] = N[b,m,p] / D[b,m]
  O[b,m,f] = sum(p) P[b,m,p] * V[b,p,f]
"""
SIZES = {"b": 2, "m": 128, "p": 256, "e": 64, "f": 64}
SELECT = """
cascade select(Q[w,e], K[p,e]) -> G[s,e]
  S[w,p] = sum(e) Q[w,e] * K[p,e]
  C[p] = max(w) S[w,p]
  T[s], I[s] = topk(p -> s, 4) C[p]
  G[s,e] = K[I[s],e]
"""


def plan_by_hand(c, rejected=()):
    """One stream over p that carries a maximum, a sum and a weighted sum."""
    reductions = tuple(s for s in c.body if isinstance(s, Einsum) and s.out in ("M", "D", "O"))
    moved = Op("exp", (Op("sub", (Tile("m.old"), Tile("m"))),))
    weight = Op("exp", (Op("sub", (aligned("S", "b", "m", "p"), Tile("m"))),))
    weighted = Op("mul", (weight, aligned("V", "b", "p", "f")))
    states = (
        State("M", "max", Const(float("-inf")), ("b", "m"), ("p",), aligned("S", "b", "m", "p"), None, Correction(()), "M"),
        State("D", "sum", Const(0.0), ("b", "m"), ("p",), weight, None, Correction((("D", moved),)), "D"),
        State("O", "sum", Const(0.0), ("b", "m", "f"), ("p",), weighted, None, Correction((("O", moved),)), "O"),
    )
    origins = (Origin("m", aligned("M", "b", "m"), ("b", "m"), "max", ("M",)),)
    inverse = Op("div", (Const(1.0), aligned("D", "b", "m")))
    values = (Value("M", "max", ((None, "M"),)), Value("D", "sum", ((None, "D"),)), Value("O", "sum", ((inverse, "O"),)))
    stage = Stage(0, reductions, origins, states, values, Domain(), tuple(rejected))
    maps = tuple(s for s in c.body if isinstance(s, Einsum) and s.out in ("S0", "S"))
    return Plan(c, (KernelPlan("attention", "p", (stage,), maps, ("Q", "K", "V"), ("O",)),))


def report(text=ATTENTION, sizes=SIZES, target="cuda:sm_90", **options):
    c = parse_cascade(text)
    if "plan" not in options and "attention" in text:
        options["plan"] = plan_by_hand(c)
    return explain(c, sizes, load_target(target), **options)


def test_keys_and_figures():
    data = report().to_dict()
    assert data["passes"] == {"before": {"b": 1, "m": 1, "e": 1, "p": 3, "f": 1}, "after": {"b": 1, "m": 1, "e": 1, "p": 1, "f": 1}}
    assert data["phases"]["p"] == 3
    q, k, v, o = 2 * 128 * 64 * 4, 2 * 256 * 64 * 4, 2 * 256 * 64 * 4, 2 * 128 * 64 * 4
    assert data["traffic_bytes"] == q + k + v + o
    points, rows = 2 * 128 * 256, 2 * 128
    work = {"matrix": points * 256, "vector": points * 4 + rows * 64, "special": points + rows}  # the division left the sum
    assert data["operations"] == work
    assert data["flops"] == sum(work.values())
    assert data["intensity"] == pytest.approx(sum(work.values()) / (q + k + v + o))
    assert data["roofline_us"] == pytest.approx(data["roofline"]["time_us"])
    assert data["roofline"]["bound_by"] == "matrix operations (CUDA core FMA, f32)"
    assert data["roofline_us"] == pytest.approx((work["matrix"] / 66.9e12 + work["vector"] / 33.45e12) * 1e6)  # one pipe does both
    assert data["sizes"] == SIZES
    assert data["missing"] == []
    assert data["target"]["basis"] == "derived"
    assert {x["tensor"]: x["whole"] for x in data["footprint"]}["S"] == ["p"]
    assert parse_cascade(data["text"]) == parse_cascade(ATTENTION)


def test_kernels_of_the_plan():
    (kernel,) = report().to_dict()["kernels"]
    assert {"name", "stream", "stages", "states", "origins", "outputs", "traffic_bytes"} <= set(kernel)
    assert (kernel["name"], kernel["stream"], kernel["outputs"]) == ("attention", "p", ["O"])
    assert kernel["stages"] == [{"reductions": ["M", "D", "O"], "domain": []}]
    assert [(s["name"], s["op"], s["corrected"]) for s in kernel["states"]] == [("M", "max", False), ("D", "sum", True), ("O", "sum", True)]
    assert kernel["origins"] == [{"name": "m", "expr": "M[b,m]", "ranks": ["b", "m"]}]
    assert kernel["traffic_bytes"] == report().to_dict()["traffic_bytes"]


def test_rewrites_say_what_they_saved():
    (rewrite,) = report().to_dict()["rewrites"]
    assert rewrite["name"] == "stream_reductions"
    assert rewrite["did"] == "M, D, O share one stream over p, D, O corrected as m moves"
    assert rewrite["saved"] == "2 passes over p, 262 kB read again"  # K, twice


def test_rejected_rewrites_are_shown():
    c = parse_cascade(ATTENTION)
    refused = Rejected("stream_reductions", "O", "round mixes an element and a moving value")
    found = report(plan=plan_by_hand(c, [refused]))
    assert found.to_dict()["rejected"] == [{"rewrite": refused.rewrite, "statement": "O", "reason": refused.reason}]
    assert refused.reason in found.to_text()
    assert refused.reason in found.to_html()


def test_missing_extents_leave_the_bytes_out_and_are_named():
    found = report(sizes={"b": 2, "e": 64})
    data = found.to_dict()
    assert data["missing"] == ["m", "p", "f"]
    assert data["passes"]["after"]["p"] == 1
    assert data["traffic_bytes"] is data["flops"] is data["roofline_us"] is data["roofline"] is data["intensity"] is None
    assert data["kernels"][0]["traffic_bytes"] is None
    assert [x["tensor"] for x in data["footprint"] if x["whole"]] == ["S", "N"]
    assert "--dims m=...,p=...,f=..." in found.to_text()
    assert "--dims m=...,p=...,f=..." in found.to_html()


def test_an_unknown_rank_among_the_extents():
    with pytest.raises(CascadeError, match="unknown rank 'q' among the sizes"):
        report(sizes={"q": 3})


def test_the_plan_is_derived_when_none_is_given():
    found = report(plan=None)
    assert found.to_dict()["passes"]["after"]["p"] == 1
    assert found.kernels[0].plan.outputs == ("O",)
    assert found.kernels[0].plan == make_plan(parse_cascade(ATTENTION), SIZES).kernels[0]


def test_the_pipeline_names_what_it_changed():
    text = ATTENTION.replace("  M[b,m]", "  S1[b,m,p] = S0[b,m,p] * scale\n  M[b,m]").replace("exp(S[", "exp(S1[")
    found = [r for r in report(text, plan=None).to_dict()["rewrites"] if r["name"] == "merge_duplicates"]
    assert found
    assert "1 statement" in found[0]["saved"]
    assert "65.5 k operations" in found[0]["saved"]


def test_a_rank_that_a_rewrite_adds_is_known_to_the_next():
    short = parse_cascade("cascade f(X[b,i], W[b]) -> Y[b]\n  C[b,i] = cumsum(i) X[b,i]\n  Y[b] = sum(i where C[b,i] > W[b]) C[b,i]\n")
    report = explain(short, {"b": 4, "i": 5}, load_target("cpu:generic"))
    assert next(r.name for r in report.rewrites) == "expand_scans"
    assert "passes" in report.to_text()


def test_a_top_k_is_a_step_of_its_own():
    found = report(SELECT, {"w": 4, "e": 8, "p": 32}, plan=None)
    data = found.to_dict()
    assert data["passes"]["before"]["p"] == 2
    assert data["traffic_bytes"] == 4 * (4 * 8 + 32 * 8 + 4 * 8)
    reads = data["reads"]["before"]["p"]["inputs"]["K"]
    assert [r["partial"] for r in reads] == [False, True]
    assert [bool(k["library"]) for k in data["kernels"]] == [False, True, False]
    cut = {"rewrite": "fuse", "statement": "C", "reason": "stored: the selection T needs it whole"}
    assert cut in data["rejected"]
    assert "partial" in found.to_text()


@pytest.mark.parametrize("target", ["cpu", "cuda:sm_90", "hip:gfx942", "ascend:910b3"])
def test_json_on_every_target(target):
    data = report(target=target).to_dict()
    assert json.loads(json.dumps(data)) == data
    assert data["roofline_us"] > 0


def test_text(golden):
    golden("attention", report().to_text())
    golden("no_extents", report(sizes={}).to_text())


# a GPU's schedule ---------------------------------------------------------------------------------------------------------------------


def test_the_default_schedule_of_a_gpu_is_told():
    found = report()
    schedule = found.to_dict()["schedule"]
    assert (schedule["basis"], schedule["split"], schedule["shared_limit"]) == ("estimated", {}, 227 * 1024)
    (kernel,) = schedule["kernels"]
    assert kernel["tiles"]["p"] * kernel["tasks"] > 0 and set(kernel["whole"]) == {"e", "f"}
    assert kernel["tasks"] == 2 * -(-128 // kernel["tiles"]["m"])
    row = next(line for line in found.to_text().splitlines() if line.startswith("  attention  m "))
    assert f"p {kernel['tiles']['p']}" in row and f"{kernel['shared_bytes'] // 1024} of 227 KiB" in row
    page = found.to_html()
    assert "Schedule, the default for cuda:sm_90" in page and "stand for one of f32" in page


@pytest.mark.parametrize(
    ("target", "dtype", "choice", "said"),
    [
        ("cuda:sm_90", "f32", "tf32x3", "products of f32 in attention: as three tf32 products each on the matrix unit (tf32x3)"),
        ("hip:gfx942", "f32", "ieee", "products of f32 in attention: in f32, without a matrix unit (ieee)"),
        ("cuda:sm_90", "bf16", None, ""),
    ],
)
def test_what_stands_for_products_of_f32_is_said(target, dtype, choice, said):
    text = ATTENTION
    for name in ("Q[b,m,e]", "K[b,p,e]", "V[b,p,f]"):
        text = text.replace(name, f"{name}: {dtype}", 1)
    found = report(text, plan=None, target=target)
    assert found.to_dict()["schedule"]["kernels"][0]["f32_products"] == choice
    assert said in found.to_text() and ("products of f32" in found.to_text()) == bool(said)


def test_a_stream_that_is_cut_has_the_kernels_of_its_stretches():
    found = report(sizes={"b": 1, "m": 8, "p": 65536, "e": 64, "f": 64}, plan=None)
    schedule = found.to_dict()["schedule"]
    parts = schedule["split"]["p"]
    assert parts > 1 and len(schedule["kernels"]) == 2 and schedule["kernels"][0]["tasks"] % parts == 0
    assert f"the stream over p is cut into {parts} stretches, merged by another kernel" in found.to_text()
    assert len(found.kernels) == 1, "the plan is told without cuts"


def test_a_kernel_without_products_has_no_estimate():
    text = "cascade total(X[i,j]) -> Y[i]\n  Y[i] = sum(j) X[i,j]\n"
    found = report(text, {"i": 4096, "j": 4096}, plan=None)
    (kernel,) = found.to_dict()["schedule"]["kernels"]
    assert kernel["shared_bytes"] is kernel["registers"] is kernel["f32_products"] is None
    assert kernel["tiles"]["j"] > 1 and "KiB" not in found.to_text()


def test_no_schedule_where_none_is_known():
    for found in (report(sizes={}), report(target="cpu"), report(target="ascend:910b3")):
        assert found.to_dict()["schedule"] is None and "schedule, the default" not in found.to_text()


def test_what_cannot_be_lowered_is_told_as_not_done():
    text = "cascade total(X[i,j]: f64) -> Y[i]\n  Y[i] = sum(j) X[i,j]\n"
    found = report(text, {"i": 4, "j": 5}, plan=None)
    assert found.to_dict()["schedule"] is None
    assert any(r["rewrite"] == "schedule" and "f64" in r["reason"] for r in found.to_dict()["rejected"])


class Tags(HTMLParser):
    """Checks that tags are closed in order and collects what a page would load."""

    def __init__(self):
        super().__init__()
        self.open, self.loaded, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "line", "circle"):
            self.open.append(tag)
        self.loaded += [value for name, value in attrs if name in ("src", "href")]

    def handle_startendtag(self, tag, attrs):
        self.loaded += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_page_is_whole_and_loads_nothing():
    page = report().to_html()
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert tags.loaded == []
    text = "".join(tags.text)
    for word in ("attention", "stream_reductions", "bound by", "Live footprint", "M, D, O"):
        assert word in text


def test_page_escapes_names():
    c = parse_cascade("cascade tiny(A[p]) -> B[p]\n  B[p] = where(A[p] < 1.0, A[p], 0.0)\n")
    page = explain(c, {"p": 4}, load_target("cpu:generic"), plan=None).to_html()
    assert "A[p] &lt; 1.0" in page
    assert "A[p] < 1.0" not in page


def test_drawing_puts_the_point_where_it_belongs():
    found = report()
    drawing = ElementTree.fromstring(re.search(r"<svg.*?</svg>", found.to_html(), re.S)[0])
    circle = drawing.find("circle")
    middle = [t for t in drawing.findall("text") if t.get("text-anchor") == "middle"]
    ticks = {t.text: float(t.get("x")) for t in middle if re.fullmatch(r"[\d.]+", t.text)}
    assert ticks["10"] < float(circle.get("cx")) < ticks["100"]  # the intensity is 43
    assert found.to_dict()["intensity"] == pytest.approx(43.5, abs=0.1)
    lines = drawing.findall("line")
    assert all(0 <= float(line.get(k)) <= 640 for line in lines for k in ("x1", "x2"))
    assert all(0 <= float(line.get(k)) <= 380 for line in lines for k in ("y1", "y2"))


def test_print_writes_the_text(capsys):
    found = report()
    found.print()
    assert capsys.readouterr().out == found.to_text() == str(found)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999, "999"), (1536, "1.54 k"), (2.5e6, "2.5 M"), (3e9, "3 G"), (4e12, "4 T"), (5e15, "5 P"), (999_600, "1 M")],
)
def test_quantities(value, text):
    assert quantity(value) == text


def test_units_of_figures():
    assert byte_count(1536) == "1.54 kB"
    assert byte_count(12) == "12 B"
    assert [duration(x) for x in (0.5, 12, 1500, 2.5e6)] == ["0.5 us", "12 us", "1.5 ms", "2.5 s"]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_cascades_in_use_come_down_to_one_pass(case):
    data = explain(traced(case), case.sizes, load_target("cpu:generic")).to_dict()
    assert data["passes"]["after"][case.reduced] == 1
    assert data["passes"]["before"][case.reduced] >= 1
    assert data["roofline_us"] > 0


@settings(max_examples=25, deadline=None)
@given(cascades())
def test_any_cascade_is_explained_and_never_takes_more_passes_than_written(drawn):
    cascade, tensors, _ = drawn
    sizes = {axis[0]: n for t in cascade.inputs for axis, n in zip(t.axes, tensors[t.name].shape, strict=True) if len(axis) == 1}
    found = explain(cascade, sizes, load_target("cpu:generic"))
    data = found.to_dict()
    assert json.loads(json.dumps(data))["missing"] == []
    assert all(count <= data["passes"]["before"][rank] for rank, count in data["passes"]["after"].items())
    moved_in = {t["tensor"]: t["bytes"] for t in data["traffic"] if t["direction"] == "in"}
    assert all(moved_in[name] == tensors[name].nbytes for name in moved_in)
    assert found.to_text().endswith("\n")
    assert found.to_html().endswith("</html>\n")
