"""The corpus that every installation holds."""

import ast
import random
import re
import sysconfig
import warnings
from collections import Counter
from pathlib import Path

import pytest

from fusejax.data.embedded import collect_embedded, embedded_corpus
from fusejax.data.embedded.extract import c_text, docstrings, document_prose, python_parts, stub_text
from fusejax.data.embedded.places import find_files
from fusejax.data.embedded.quality import NearDuplicates, is_readable, unseen_paragraphs
from fusejax.errors import InputError

_ENGLISH = "This is the kind of text that one would like to read in a corpus, and it is English."


@pytest.fixture(scope="module")
def small():
    return collect_embedded(max_bytes_per_domain=120_000)


def test_real_interpreter_gives_three_domains_near_the_cap(small):
    corpus, _ = small
    assert list(corpus) == ["python", "prose", "c"]
    for domain, documents in corpus.items():
        assert 80_000 <= sum(d.n_bytes for d in documents) <= 120_000 + 48_000, domain
        assert [d.id for d in documents] == sorted({d.id for d in documents})
        assert all(d.id.startswith(f"{domain}/") and d.domain == domain for d in documents)
        assert not any(str(Path.home()) in d.id or sysconfig.get_paths()["stdlib"] in d.id for d in documents)
        assert len({d.text for d in documents}) == len(documents)


def test_real_sample_spreads_over_packages(small):
    corpus, _ = small
    for domain, least in (("python", 8), ("prose", 15)):
        sizes = Counter()
        for document in corpus[domain]:
            sizes[document.id.split("/")[1]] += document.n_bytes
        assert len(sizes) >= least
        assert max(sizes.values()) <= 0.6 * sum(sizes.values())


def test_real_code_has_no_docstrings_and_no_comments(small):
    corpus, _ = small
    for document in corpus["python"]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(document.text) if document.n_bytes < 47_000 else ast.parse("")
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                assert ast.get_docstring(node) is None, document.id
    assert not any(line.startswith("#") for d in corpus["python"] for line in d.text.split("\n"))


def _fill(root, groups, *, words):
    """Packages with distinct text of every domain, deterministic."""
    for group in groups:
        directory = root / group
        directory.mkdir(parents=True)
        for number in range(6):
            rng = random.Random(f"{group}{number}")
            names = [f"{rng.choice(words)}_{rng.choice(words)}" for _ in range(30)]
            body = "".join(f"def {n}(x):\n    return x.{n[::-1]} + {n}(x)\n\n" for n in names)
            prose = "\n\n".join(f"{_ENGLISH} It is about {n.replace('_', ' and the ')}." for n in names[:12])
            (directory / f"m{number}.py").write_text(f'"""{prose}"""\n{body}')
            (directory / f"h{number}.h").write_text("".join(f"int {n}(const char *{n[::-1]});\n" for n in names))
            (directory / f"s{number}.pyi").write_text("".join(f"def {n}(x: int) -> {n[::-1]}: ...\n" for n in names))
    return [("", root)]


_WORDS = re.findall(
    r"\w+", "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau"
)


def test_deterministic_and_another_seed_samples_other_files(tmp_path):
    roots = _fill(tmp_path, ["one", "two", "three"], words=_WORDS)
    first = embedded_corpus(max_bytes_per_domain=6000, roots=roots)
    assert first == embedded_corpus(max_bytes_per_domain=6000, roots=roots)
    assert first != embedded_corpus(max_bytes_per_domain=6000, roots=roots, seed=1)
    for documents in first.values():
        assert {d.id.split("/")[1] for d in documents} == {"one", "two", "three"}


def test_stubs_replace_a_missing_domain(tmp_path):
    roots = _fill(tmp_path, ["one", "two"], words=_WORDS)
    for header in tmp_path.rglob("*.h"):
        header.unlink()
    assert list(embedded_corpus(max_bytes_per_domain=6000, roots=roots)) == ["python", "prose", "stubs"]


def test_too_few_domains_is_an_error_with_the_bytes_found(tmp_path):
    roots = _fill(tmp_path, ["one"], words=_WORDS)
    for file in [*tmp_path.rglob("*.h"), *tmp_path.rglob("*.pyi")]:
        file.unlink()
    with pytest.raises(InputError, match=r"python [\d,]+, prose [\d,]+, c 0, stubs 0, json 0 bytes.*Install fusejax"):
        embedded_corpus(max_bytes_per_domain=6000, roots=roots)
    with pytest.raises(InputError, match="at least 1000"):
        embedded_corpus(max_bytes_per_domain=10, roots=roots)


def test_bad_files_are_skipped_and_counted(tmp_path):
    roots = _fill(tmp_path, ["one", "two"], words=_WORDS)
    (tmp_path / "one" / "latin.h").write_bytes(b"// caf\xe9\n" * 100)
    (tmp_path / "one" / "big.h").write_text("int x;\n" * 100_000)
    (tmp_path / "one" / "table.h").write_text("".join(f"{i}, {i + 1}, {i + 2},\n" for i in range(200)))
    (tmp_path / "one" / "copy.h").write_text("\n" + (tmp_path / "two" / "h0.h").read_text())
    (tmp_path / "one" / "dangling.h").symlink_to(tmp_path / "nowhere")
    (tmp_path / "one" / "null.h").write_text("int a\0;\n" * 100)
    corpus, left_out = collect_embedded(max_bytes_per_domain=20_000, roots=roots)
    names = {d.id.split("/")[-1] for d in corpus["c"]}
    assert not names & {"latin.h", "big.h", "table.h", "dangling.h", "null.h"}
    assert len(corpus["c"]) == 12  # either the copy or what it copies
    counted = ("not_utf8", "too_large", "low_quality", "near_duplicate", "unreadable")
    assert {k: left_out[k] for k in counted} == dict.fromkeys(counted, 1)


def test_places_skip_tests_vendored_copies_ourselves_and_links_out(tmp_path):
    site, outside = tmp_path / "site", tmp_path / "private"
    outside.mkdir()
    (outside / "secret.py").write_text("x = 1\n")
    for name in ("pkg/a.py", "pkg/tests/b.py", "pkg/_vendor/c.py", "fusejax/d.py", "pkg/__pycache__/e.py", "f.py"):
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text("x = 1\n")
    (site / "Pkg-1.0.dist-info").mkdir()
    (site / "Pkg-1.0.dist-info" / "METADATA").write_text("Name: pkg\n")
    (site / "pkg" / "link.py").symlink_to(outside / "secret.py")
    (site / "pkg" / "inner.py").symlink_to(site / "pkg" / "a.py")
    (site / "linked").symlink_to(outside, target_is_directory=True)
    files = find_files([("", site)])
    assert [(f.group, f.label) for f in files] == [
        ("f", "f.py"),
        ("pkg", "Pkg-1.0.dist-info/METADATA"),
        ("pkg", "pkg/a.py"),
        ("pkg", "pkg/inner.py"),
    ]


def test_python_parts_keep_the_program():
    source = (
        f'#!/bin/sh\n"""{_ENGLISH}\n\nShort."""\nimport os  # why\n\n# a comment\nclass A:\n'
        '    """Only a docstring."""\n\n'
        "class B: \"one line\"\n\ndef f(x):\n    '''Doc.'''; return \"# no comment\" + x  # yes\n\n"
        'def é():\n    r"""Doc with \\d."""\n    # inner\n    y = """# kept\n    # kept too"""\n    return y\n'
    )
    code, prose = python_parts(source)
    assert prose == _ENGLISH + "\n" == docstrings(source)
    kept = (
        'import os\n\nclass A:\n    pass\n\nclass B: pass\n\ndef f(x):\n    pass; return "# no comment" + x\n\n'
        'def é():\n    y = """# kept\n    # kept too"""\n    return y\n'
    )
    assert code == kept


def test_python_parts_of_the_standard_library_mean_the_same():
    """Comments and docstrings apart, the syntax tree of real modules is unchanged."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for name in ("argparse.py", "dataclasses.py", "tokenize.py", "typing.py", "json/decoder.py", "pdb.py", "turtle.py"):
        source = (stdlib / name).read_text(encoding="utf-8")
        code, _ = python_parts(source)
        assert code, name
        trees = [ast.parse(source), ast.parse(code)]
        for node in (n for tree in trees for n in ast.walk(tree) if hasattr(n, "body") and isinstance(n.body, list)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                doc = ast.get_docstring(node, clean=False) is not None
                node.body = [s for s in node.body[doc:] if not isinstance(s, ast.Pass)]
        assert ast.dump(trees[0]) == ast.dump(trees[1]), name


@pytest.mark.parametrize("text", ["def broken(:\n", "# Generated by a tool, do not edit\nx = 1\n", "x = '\0'\n"])
def test_python_parts_of_no_use(text):
    assert python_parts(text) == ("", "")
    assert docstrings(text) == ""


def test_c_text_drops_legal_notices_only():
    notice = "/* Copyright 2020 X\n * Licensed under Y */\n"
    lines = "// Licensed to Z\n// under more\n"
    assert c_text(notice + "/* what it does */\nint f(void);\n" + lines + "int g;  // here\n") == (
        "/* what it does */\nint f(void);\nint g;  // here\n"
    )
    assert c_text("/* DO NOT EDIT */\nint x;\n") == ""


def test_stub_text():
    assert stub_text("# c\ndef f(x: int) -> str: ...  # d\n") == "def f(x: int) -> str: ...\n"
    assert stub_text("def f(:\n") == ""


def test_document_prose_keeps_english_and_drops_the_rest():
    text = (
        f"# Title\n\n![badge](http://x)\n\n{_ENGLISH}\n\n```python\n{_ENGLISH}\n```\n\n"
        ">>> f(the, of, and, to, in, a, is, that)\n\n"
        "| a | table | of | the | and | to | in | is |\n\nint foo_bar(int x); int baz_qux(int y); float z[8];\n\n"
        "Read the [manual](https://example.org/long/path) before you do this, and ask if it is not clear to you.\n"
    )
    assert document_prose(text) == (
        f"{_ENGLISH}\n\nRead the manual before you do this, and ask if it is not clear to you.\n"
    )


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("\n".join(f"line {w} of readable text" for w in _WORDS), True),
        ("short", False),
        ("x" * 400 + "\n" + "\n".join(_WORDS * 2), False),
        ("the same line\n" * 50, False),
        ("\n".join(f"0x{i:04d}, 0x{i:04d}," for i in range(50)), False),
        ("\n".join("{}[]();,.<>" * 3 + str(w) for w in _WORDS), False),
    ],
    ids=["text", "short", "long-line", "repeats", "digits", "signs"],
)
def test_is_readable(text, good):
    assert is_readable(text) == good


def test_near_duplicates():
    lines = [f"line about {a} and {b}" for a in _WORDS for b in ("x", "y")]
    near = NearDuplicates()
    assert near.admit("\n".join(lines[:20]))
    assert not near.admit("\n".join("   " + line.upper() for line in lines[:20]))
    assert not near.admit("\n".join(["new first line", *lines[:18], "new last line"]))
    assert near.admit("\n".join(lines[18:]))


def test_unseen_paragraphs():
    seen = set()
    assert unseen_paragraphs("One two.\n\nThree.\n", seen) == "One two.\n\nThree.\n"
    assert unseen_paragraphs("one  TWO.\n\nFour.\n", seen) == "Four.\n"
    assert unseen_paragraphs("Three.", seen) == ""
