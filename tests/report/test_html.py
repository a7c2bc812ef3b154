"""The page: complete, self-contained, escaped; the pictures: SVG files, none for what was not recorded."""

import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from fusejax.errors import InputError
from fusejax.report import accuracy_table, build_report
from fusejax.report.merges import MergeFacts
from fusejax.report.plots import Curve, curve_of, plot_curves
from fusejax.report.spans import MOST, SpanText
from fusejax.report.style import BACKGROUNDS, FUSIONS, ROLES, SOURCES, colours_of, source_colours

RESULT = {
    "bits_per_byte": {
        "source:prose": {"prose": 2.1, "code": 3.4, "mean": 2.75},
        "target": {"prose": 2.6, "code": 2.5, "mean": 2.55},
        "fused": {"prose": 2.4, "code": 2.3, "mean": 2.35},
    },
    "seconds": 61.2,
    "peak_rss_bytes": 2**30,
    "export": "runs/x/export",
}


class Page(HTMLParser):
    """Collects tags, what they point to and the text, and checks that tags are closed in order."""

    VOID = frozenset({"meta", "img", "br", "link"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.text, self.open = [], [], "", []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in {"src", "href"}]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def svg_size(path):
    root = ET.fromstring(path.read_text(encoding="utf-8"))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    return [float(number) for number in root.attrib["viewBox"].split()[2:]]


@pytest.fixture
def metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": s, "loss": 4 - s / 50, "clm_nats": 4 - s / 60, "tokens_per_second": 9000 + s} for s in range(60)]
    for row in rows:
        row |= {"source_tokens/code": 30.0, "source_nats/code": 0.5 - row["step"] / 200, "source_share/code": 0.75}
        row |= {"source_tokens/prose": 10.0 * (row["step"] % 2), "source_nats/prose": 0.25, "source_share/prose": 0.25}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


CHOICES = {"fused": {"positions": 50, "supervised": 40, "wins": {"prose": 10, "code": 30}}}
ALIGNED = {"prose": {"aligned": 700, "conditioned": 250, "dropped": 50, "symbol_agreement": 0.875, "mass_kept": None}}
MERGES = {"both": MergeFacts("sce", ("fused", "other"), {"layers.0.w": [0.25, 0.75], "layers.1.w": [0.5, 0.5]})}


def test_a_full_report_is_one_page_with_its_pictures_inside(tmp_path, metrics):
    path = build_report(
        tmp_path / "run",
        RESULT,
        metrics={"clm": metrics, "fused": metrics},
        alignment=ALIGNED,
        choices=CHOICES,
        merges=MERGES,
        trained={"fused": {"compile_seconds": 3.25, "peak_bytes": 2**21}},
        seconds={"train": 12.5},
        configuration={"train": {"learning_rate": 2e-5}},
        environment={"python": "3.11"},
    )
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert path == tmp_path / "run" / "report.html"
    drawn = sorted((tmp_path / "run" / "plots").iterdir())
    assert page.tags.count("img") == len(drawn) == 3 + 2 + 4 + 2 + 1  # results, training, sources, merge, speed
    assert all(link.startswith(("data:image/svg+xml;base64,", "#")) for link in page.links)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "url(" not in text and '<img alt=""' not in text
    for expected in ("2.350", "source:prose", "61 s", "1.00 GiB", "runs/x/export", "learning_rate", "700"):
        assert expected in page.text
    for expected in ("87.5 %", "60.0 % 30", "20.0 % 10", "0.3750", "3.2 s", "2.0 MiB", "12.5"):
        assert expected in page.text, expected
    for file in drawn:
        assert min(svg_size(file)) > 70
    assert not list((tmp_path / "run").glob(".*.tmp"))


def test_the_contents_lead_to_the_sections_that_are_there(tmp_path, metrics):
    text = build_report(tmp_path, RESULT, metrics={"fused": metrics}).read_text(encoding="utf-8")
    anchors = re.findall(r'href="#([^"]+)"', text)
    assert anchors == re.findall(r'<section id="([^"]+)"', text)
    assert anchors == ["results", "training", "divergence-per-source", "chosen-sources", "throughput"]


def test_the_divergence_of_a_source_is_weighted_by_its_positions(tmp_path, metrics):
    page = Page(build_report(tmp_path, {}, metrics={"fused": metrics}).read_text(encoding="utf-8"))
    first, last = (0.5 - sum(s / 200 for s in fifth) / 12 for fifth in (range(12), range(48, 60)))
    assert f"fused from code{first:.4f}{last:.4f}" in page.text.replace("\n", "")
    assert "fused from prose0.25000.2500" in page.text.replace("\n", "")
    assert "300" in page.text and "1,800" in page.text


def test_results_show_their_errors_and_the_difference_from_training_on_text_alone(tmp_path):
    results = RESULT["bits_per_byte"] | {"clm": {"prose": 2.5, "code": 2.4, "mean": 2.45}}
    errors = {"fused": {"prose": 0.0123, "mean": float("nan")}, "gone": {"prose": 1.0}}
    documents = {"target": {"count": 1200, "p10": 1.2345, "median": 2.5, "p90": 3.5}, "empty": {"count": 0}}
    result = {"bits_per_byte": results, "standard_error": errors, "documents": documents}
    text = build_report(tmp_path, result).read_text(encoding="utf-8")
    assert re.search(r"<td>2\.400 <small>±&nbsp;0\.012</small></td>", text)
    assert text.count("±&nbsp;") == 1
    assert "<td>1,200</td><td>1.234</td><td>2.500</td>" in text and 'scope="row">empty' not in text
    figure = (tmp_path / "plots" / "bits_per_byte-0.svg").read_bytes()
    build_report(tmp_path, {"bits_per_byte": results})
    assert figure != (tmp_path / "plots" / "bits_per_byte-0.svg").read_bytes(), "error bars are drawn"
    assert "mean − clm" in text and "−0.1000 <small>(−4.08 %)</small>" in text


def test_tasks_have_their_table(tmp_path):
    tasks = {"target": {"a<b.json": {"accuracy": 0.25, "stderr": 0.125, "examples": 12}}, "fused": {}}
    text = build_report(tmp_path, RESULT | {"tasks": tasks}).read_text()
    assert "a&lt;b.json" in text and "<b>0.250</b> <small>±&nbsp;0.125</small>" in text
    assert accuracy_table(tasks).splitlines()[2:] == ["| target | 0.250 ± 0.125 |", "| fused |  |"]
    assert accuracy_table({"target": {}}) == ""


def test_what_is_missing_is_named_and_the_rest_is_shown(tmp_path, metrics):
    path = build_report(tmp_path, {}, metrics={"fused": metrics}, missing=["Model <x>: its training has not begun."])
    page = Page(path.read_text(encoding="utf-8"))
    assert "Model <x>: its training has not begun." in page.text
    assert "Bits per byte:" not in page.text and "Gradient norm" not in page.text
    assert "Loss (nats per token)" in path.read_text(encoding="utf-8")


def test_spans_show_both_tokenizations_and_no_more_than_a_few(tmp_path):
    text = "before <b>&é</b> after".encode()
    span = SpanText("a<b", 7, 14, text, {"target": [0, 7, 9, 12, 14], "prose": [0, 3, 11, 14]})
    page = build_report(tmp_path, {}, alignment=ALIGNED, spans={"prose": [span] * (MOST + 3), "none": []})
    found = page.read_text(encoding="utf-8")
    assert found.count('<div class="span">') == MOST
    assert "a&lt;b, bytes 7 to 14" in found
    target, source = re.findall(r"<dd><code>(.*?)</code></dd>", found)[:2]
    cut = lambda row: re.findall(r'class="(tok[^"]*)">([^<]*)<', row)  # noqa: E731
    assert cut(target)[:4] == [
        ("tok", "before·"),
        ("tok in", "&lt;b"),
        ("tok in", "&gt;&amp;\N{REPLACEMENT CHARACTER}"),
        ("tok in", "\N{REPLACEMENT CHARACTER}&lt;"),
    ]
    assert [word for _, word in cut(source)][:2] == ["bef", "ore·"]


def test_merges_without_coefficients_or_with_equal_ones_have_no_figure(tmp_path):
    merges = {
        "ties": MergeFacts("ties", ("a", "b"), {}),
        "linear": MergeFacts("linear", ("a", "b"), {"layers.0.w": [0.5, 0.5], "layers.1.w": [0.5, 0.5]}),
    }
    page = Page(build_report(tmp_path, {}, merges=merges).read_text(encoding="utf-8"))
    assert "no coefficient per matrix" in page.text and "the same in every matrix" in page.text
    assert "img" not in page.tags


def test_names_from_outside_are_escaped(tmp_path):
    evil = "<script>alert(1)</script>"
    path = build_report(
        tmp_path,
        {"bits_per_byte": {evil: {evil: 1.0}}, "export": evil},
        alignment={evil: {"aligned": 1}},
        choices={evil: {"positions": 2, "supervised": 1, "wins": {evil: 1}}},
        merges={evil: MergeFacts(evil, (evil,), {evil: [1.0]})},
        spans={evil: [SpanText(evil, 0, 4, evil.encode(), {evil: [0, 4]})]},
        seconds={evil: 1.0},
        missing=[evil],
        configuration={evil: evil},
        title=evil,
    )
    page = Page(path.read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert page.text.count(evil) >= 16


def test_empty_sections_and_pictures_are_left_out(tmp_path):
    path = build_report(tmp_path, {})
    page = Page(path.read_text(encoding="utf-8"))
    assert "section" not in page.tags
    assert not (tmp_path / "plots").exists()


def test_a_damaged_metrics_file_leaves_no_page(tmp_path):
    (tmp_path / "m.jsonl").write_text("broken\n{}\n", encoding="utf-8")
    with pytest.raises(InputError, match="line 1"):
        build_report(tmp_path / "run", RESULT, metrics={"clm": tmp_path / "m.jsonl"})
    assert not (tmp_path / "run" / "report.html").exists()


def test_a_run_twice_draws_the_same_bytes(tmp_path):
    """No time, no version in the picture: a rerun of a finished report changes nothing."""
    first = build_report(tmp_path / "a", RESULT).read_bytes()
    assert first == build_report(tmp_path / "b", RESULT).read_bytes()


def test_figures_of_an_earlier_report_do_not_stay(tmp_path, metrics):
    build_report(tmp_path, RESULT, metrics={"clm": metrics})
    build_report(tmp_path, RESULT)
    assert all(path.name.startswith("bits_per_byte") for path in (tmp_path / "plots").iterdir())


def test_nothing_to_draw_draws_nothing(tmp_path):
    assert curve_of({"unknown": ([1.0], [1.0])}, "loss", "#000000") is None
    assert plot_curves({"clm": None}, tmp_path / "x.svg", title="t") is None
    assert not (tmp_path / "x.svg").exists()


def test_a_term_that_an_arm_does_not_have_is_no_curve_at_zero():
    assert curve_of({"fusion_nats": ([1.0, 2.0], [0.0, 0.0])}, "fusion_nats", "#000000") is None


def test_figures_follow_light_and_dark(tmp_path):
    path = plot_curves({"a": Curve([1.0, 2.0], [1.0, 3.0], "#d9662b")}, tmp_path / "x.svg", title="title")
    assert path is not None
    text = path.read_text(encoding="utf-8")
    assert "prefers-color-scheme:dark" in text and "var(--ink)" in text and ">title</text>" in text
    assert "#d9662b" in text and "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)


def test_colours_follow_the_name():
    assert colours_of(["fused", "clm"])["fused"] == colours_of(["clm", "fused"])["fused"]
    assert colours_of(["pairwise"])["pairwise"] == colours_of(["clm", "pairwise"])["pairwise"]
    many = colours_of([f"fusion-{i}" for i in range(len(FUSIONS))])
    assert len(set(many.values())) == len(FUSIONS)
    assert len(set(colours_of(["source:a", "source:b"]).values())) == 2
    assert source_colours(["target", "a", "b"])["a"] == source_colours(["a", "target"])["a"]


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return sum(w * x for w, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("colour", [*ROLES.values(), *SOURCES, *FUSIONS])
def test_colours_stand_out_from_light_and_dark(colour):
    for background in BACKGROUNDS:
        low, high = sorted([luminance(colour), luminance(background)])
        assert (high + 0.05) / (low + 0.05) >= 3
