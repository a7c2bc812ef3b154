"""The page about an alignment: its numbers are those of the alignment, its text is escaped and visible."""

import html
import json
import re

import numpy as np
import pytest

from fusejax.alignment.details import SIZES, alignment_details
from fusejax.stages.align import command
from fusejax.stages.compare import compare_tokenizers, first_bytes, write_alignment_page
from tests.alignment.tiny_tokenizers import TEXT, tiny_directory, tiny_tokenizer

TEXTS = [TEXT, "<script>alert('x')</script> & the castle", "", "The history of the castle"]


@pytest.fixture(scope="module")
def comparison():
    return compare_tokenizers(tiny_tokenizer("byte_level"), tiny_tokenizer("spm_bpe"), TEXTS, vocabulary="coarse")


def test_the_page_shows_what_was_counted(comparison, tmp_path):
    page = write_alignment_page(comparison, tmp_path / "new" / "place")
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>") and "data:image/png;base64," in text
    assert f"{100 * comparison.facts['symbol_agreement']:.2f} %" in text
    assert f"{comparison.facts['positions']:,} target positions" in text
    assert "<script>" not in text and "http" not in re.sub(r"data:[^\"]*", "", text)
    assert (page.parent / "alignment.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((page.parent / "alignment.json").read_text())
    assert found["aligned"] == comparison.facts["aligned"]
    assert abs(sum(found["details"]["group_sizes"].values()) - 1) < 1e-9


def test_spans_are_shown_with_the_text_around_them(comparison, tmp_path):
    text = write_alignment_page(comparison, tmp_path).read_text(encoding="utf-8")
    span = comparison.facts["worst_spans"][0]
    raw = TEXTS[int(span["doc_id"])].encode()[span["start"] : span["stop"]]
    shown = raw.decode("utf-8", "replace").replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥")
    assert f"<b>{html.escape(shown)}</b>" in text


def test_details_against_a_loop(comparison):
    found = comparison
    details = alignment_details(
        found.sources, found.targets, found.indices, found.openings, found.vocab_map, found.source, found.target
    )
    of_source, of_target = found.vocab_map
    sizes, wrong = [], {}
    for theirs, ours, index, openings in zip(found.sources, found.targets, found.indices, found.openings, strict=True):
        for t, s in enumerate(index):
            if s < 0:
                continue
            u, v = int(theirs.labels[s]), int(ours.labels[t])
            symbol = dict(openings).get(t, of_source)[u]
            if symbol == of_target[v] >= 0:
                sizes.append(int((of_target == symbol).sum()))
            else:
                wrong[u, v] = wrong.get((u, v), 0) + 1
    sizes = np.array(sizes)
    assert len(details["group_sizes"]) == len(SIZES) + 1
    np.testing.assert_allclose(details["group_sizes"]["1"], (sizes == 1).mean())
    np.testing.assert_allclose(details["group_sizes"]["5-16"], ((sizes > 4) & (sizes <= 16)).mean())
    np.testing.assert_allclose(details["mean_log2_members"], np.log2(sizes).mean())
    counts = sorted(wrong.values(), reverse=True)[:20]
    assert [pair["count"] for pair in details["disagreements"]] == counts
    assert sum(wrong.values()) == found.facts["aligned"] - found.facts["agreed"]


def test_the_command_writes_the_page(tmp_path):
    data = tmp_path / "text.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS if text))
    both = [
        "--source-tokenizer",
        str(tiny_directory("byte_level")),
        "--target-tokenizer",
        str(tiny_directory("spm_bpe")),
    ]
    words = [*both, "--data", str(data), "--report", "--out", str(tmp_path / "out")]
    result = command("align", words)
    assert (tmp_path / "out" / "alignment.html").is_file()
    assert "worst spans" in result.text and "alignment.html" in result.text
    with pytest.raises(ValueError, match="give both"):
        command("align", [*both, "--data", str(data), "--out", str(tmp_path / "out")])


def test_exact_vocabulary_and_the_same_tokenizer():
    source = tiny_tokenizer("spm_bpe")
    assert compare_tokenizers(source, source, TEXTS, vocabulary="coarse").facts["symbol_agreement"] == 1
    exact = compare_tokenizers(source, tiny_tokenizer("byte_level"), TEXTS, vocabulary="exact")
    coarse = compare_tokenizers(source, tiny_tokenizer("byte_level"), TEXTS, vocabulary="coarse")
    assert exact.facts["symbol_agreement"] < coarse.facts["symbol_agreement"]


def test_the_sample_ends_before_its_limit():
    assert first_bytes(["ab", "é", "xyz"], 4) == ["ab", "é"]
    assert first_bytes(["ab"], 1) == first_bytes([], 9) == []
