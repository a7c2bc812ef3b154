"""The page: complete, self-contained, escaped; the pictures: real PNG files, none for what was not recorded."""

import json
import re
import struct
from html.parser import HTMLParser

import pytest

from fusejax.errors import InputError
from fusejax.report import accuracy_table, build_report
from fusejax.report.plots import colour_of, plot_shares, plot_training

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


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


@pytest.fixture
def metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": s, "loss": 4 - s / 50, "clm_nats": 4 - s / 60, "tokens_per_second": 9000 + s} for s in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_spread_over_documents_has_its_tables(tmp_path):
    errors = {"target": {"prose": 0.0123, "mean": 0.0456}, "fused": {"prose": 0.02}}
    spread = {"target": {"count": 7, "p10": 1.5, "median": 2.5, "p90": 3.25}, "fused": {"count": 0}}
    plain = build_report(tmp_path / "plain", RESULT)
    path = build_report(tmp_path / "run", RESULT | {"standard_error": errors, "documents": spread})
    text = Page(path.read_text()).text
    for said in ("Spread over documents", "0.0123", "0.0456", "median", "3.250"):
        assert said in text and said not in Page(plain.read_text()).text
    pictures = [place / "plots" / "bits_per_byte.png" for place in (plain.parent, path.parent)]
    assert pictures[0].read_bytes() != pictures[1].read_bytes(), "error bars are drawn"


def test_tasks_have_their_table(tmp_path):
    tasks = {"target": {"a<b.json": {"accuracy": 0.25, "stderr": 0.125, "examples": 12}}, "fused": {}}
    text = build_report(tmp_path, RESULT | {"tasks": tasks}).read_text()
    assert "a&lt;b.json" in text and "0.250 ± 0.125" in Page(text).text
    assert accuracy_table(tasks).splitlines()[2:] == ["| target | 0.250 ± 0.125 |", "| fused |  |"]
    assert accuracy_table({"target": {}}) == ""


def test_a_full_report_is_one_page_with_its_pictures_inside(tmp_path, metrics):
    path = build_report(
        tmp_path / "run",
        RESULT,
        metrics={"clm": metrics, "fused": metrics},
        alignment={"prose": {"aligned": 700, "conditioned": 250, "dropped": 50}},
        choices={"train": {"prose": 10, "code": 30}},
        configuration={"train": {"learning_rate": 2e-5}},
        environment={"python": "3.11"},
    )
    page = Page(path.read_text(encoding="utf-8"))
    assert page.open == []
    assert path == tmp_path / "run" / "report.html"
    assert page.tags.count("img") == 4
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "url(" not in path.read_text(encoding="utf-8")
    for expected in ("2.350", "source:prose", "61 s", "1.00 GiB", "runs/x/export", "learning_rate", "700"):
        assert expected in page.text
    for name in ("bits_per_byte", "training", "alignment", "choices"):
        width, height = png_size(tmp_path / "run" / "plots" / f"{name}.png")
        assert min(width, height) > 100
    assert not list((tmp_path / "run").glob(".*.tmp"))


def test_names_from_outside_are_escaped(tmp_path):
    evil = "<script>alert(1)</script>"
    path = build_report(
        tmp_path,
        {"bits_per_byte": {evil: {evil: 1.0}}, "export": evil},
        alignment={evil: {evil: 1}},
        configuration={evil: evil},
        title=evil,
    )
    page = Page(path.read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert page.text.count(evil) >= 6


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


def test_nothing_to_draw_draws_nothing(tmp_path):
    assert plot_training({"clm": {"unknown": ([1.0], [1.0])}}, tmp_path / "x.png") is None
    assert plot_shares({"a": {"p": 0}}, tmp_path / "x.png", title="t") is None
    assert not (tmp_path / "x.png").exists()


def test_a_term_that_an_arm_does_not_have_is_no_curve_at_zero(tmp_path):
    assert plot_training({"clm": {"fusion_nats": ([1.0, 2.0], [0.0, 0.0])}}, tmp_path / "x.png") is None


def test_colours_follow_the_name():
    assert colour_of("fused", 0) == colour_of("fused", 5)
    assert colour_of("pairwise", 0) == colour_of("pairwise", 6) != colour_of("fused", 0)
    assert colour_of("source:a", 0) != colour_of("source:b", 1)
    assert re.fullmatch("#[0-9a-f]{6}", colour_of("source:a", 17))
