"""Conversations and texts with trained spans through a whole run: what is masked has no influence, what is not, has."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from fusejax.alignment import event_groups
from fusejax.cli import main
from fusejax.config import CorpusConfig, RunConfig
from fusejax.data.chat import template_of
from fusejax.data.corpus import read_corpus
from fusejax.data.loader import FusionLoader
from fusejax.errors import InputError
from fusejax.io.store import Record, RecordReader
from fusejax.io.tokenizers import load_tokenizer
from fusejax.losses.fused import batch_fusion_loss
from fusejax.models import head_kernel, hidden_states
from fusejax.stages.align import align
from fusejax.stages.capture import capture
from fusejax.stages.context import Run
from fusejax.stages.convert import export_run
from fusejax.stages.evaluate import evaluate_run
from fusejax.stages.fuse import PARTITIONS, fuse
from fusejax.stages.prepare import prepare
from fusejax.stages.train import train
from fusejax.types import EventGroups
from tests.stages import tiny


def _talks(count: int) -> list[dict]:
    said = iter(tiny.texts(4 * count, seed=9))
    talks = []
    for number in range(count):
        messages = [{"from": "human", "value": next(said)}, {"from": "gpt", "value": next(said)}]
        if number % 3 == 0:
            messages += [{"from": "human", "value": next(said)}, {"from": "gpt", "value": next(said)}]
        talks.append({"id": str(number), "conversations": messages})
    return talks


def _write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def _config(root, **changes) -> RunConfig:
    """The tiny run on conversations and masked texts; every model renders in its own way."""
    texts = tiny.texts(20, seed=5)
    masked = [{"text": text, "spans": [[4, len(text) // 2], [len(text) // 2 + 3, len(text)]]} for text in texts]
    made = tiny.make_config(root).model_dump(mode="json")
    made["corpus"]["train"] = [
        {"path": _write(root / "talks.jsonl", _talks(30)), "domain": "chat", "messages_field": "conversations"},
        {"path": _write(root / "masked.jsonl", masked), "domain": "spans", "spans_field": "spans"},
        {"path": str(tiny.write_jsonl(root / "plain.jsonl", tiny.texts(12, seed=8))), "domain": "plain"},
    ]
    made["corpus"]["chat_template"] = "openchat_3.5"
    made["target"]["chat_template"] = "vicuna"
    made["align"] = {"chain": True, "conditioned": True}
    made["train"] |= {"packing": True, "max_steps": 3}
    made["evaluate"]["ensembles"] = ["mean", "weighted", "top1"]
    made["fusions"] = made["fusions"][1:]  # the mixture, in which the target takes part
    made["merge"] = None
    return RunConfig.model_validate(made | changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    made = Run(_config(tmp_path_factory.mktemp("chat")))
    made.start()
    for stage in (prepare, capture, align, fuse):
        stage(made)
    return made


def test_the_corpus_keeps_turns_and_spans(run):
    documents = read_corpus(run.corpus_dir, "train")
    talks = [d for d in documents if d.domain == "chat"]
    assert talks and all(role in ("user", "assistant") for d in talks for role, _ in d.messages)
    assert all(d.trained_bytes == sum(len(c.encode()) for r, c in d.messages if r == "assistant") for d in talks)
    assert all(d.spans and not d.turns for d in documents if d.domain == "spans")
    assert all(d.spans is None for d in documents if d.domain == "plain")


@pytest.mark.parametrize("name", ["a", "b", "target"])
def test_supervised_positions_stand_on_trained_bytes(run, name):
    documents, tokenizer = read_corpus(run.corpus_dir, "train"), run.tokenizer(run.config.target)
    found = dict.fromkeys(("chat", "spans", "plain"), 0)
    for document, record in zip(documents, RecordReader(run.aligned_dir(name)), strict=True):
        arrays, mask = record.arrays, record.arrays.get("mask")
        if mask is None:
            assert document.spans is None
            mask = np.ones(len(arrays["tokens"]), np.int8)
        assert (arrays["status"][mask == 0] == 0).all() and (arrays["ids"][mask == 0] == -1).all()
        found[document.domain] += int((arrays["status"] > 0).sum())
        if document.spans is None:
            continue
        data = document.text.encode()
        trained = b"".join(data[a:b] for a, b in document.spans)
        assert record.header["n_bytes"] == len(trained) >= arrays["byte_ends"].max()
        labels = [tokenizer.token_bytes[i] for i in arrays["labels"][mask == 1]]
        said = b"".join(label or b"" for label in labels)
        squeezed = said.replace(b" ", b"")
        if document.turns:
            assert squeezed == trained.replace(b" ", b"")
            assert sum(label is None for label in labels) == len(document.spans), "each turn's stop token is trained"
            stops = (arrays["labels"] == tokenizer.eos_id) & (mask == 1)
            assert (arrays["status"][stops] == 1).all(), "and supervised by the other tokenizer's stop"
        else:
            assert squeezed in trained.replace(b" ", b"") or len(squeezed) < len(trained)
    assert all(found.values())


def test_a_tokenizer_aligned_with_itself_keeps_its_own_distributions(run):
    for captured, aligned in zip(
        RecordReader(run.captured_dir("target")), RecordReader(run.aligned_dir("target")), strict=True
    ):
        spans = captured.arrays.get("spans", np.zeros(len(captured.arrays["tokens"])))
        rows = (spans >= 0) & (aligned.arrays["status"] > 0)
        assert rows.sum() == (spans >= 0).sum()
        np.testing.assert_array_equal(captured.arrays["labels"], aligned.arrays["labels"])
        # Entries that are stored as equal may change places.
        found = np.sort(captured.arrays["topk_ids"][rows], axis=1), np.sort(aligned.arrays["ids"][rows], axis=1)
        np.testing.assert_array_equal(*found)


class _Records(list):
    """Records in memory, with what the loader asks of a reader."""


def _gradients(run, records):
    config = run.model(run.config.target)
    loader = FusionLoader(_Records(records), batch_size=4, seq_len=32, prefetch=0)
    with np.load(run.fused_dir("mixed") / PARTITIONS) as arrays:
        groups = [event_groups(symbols) for symbols in arrays["symbol_of_target"]]
    groups = EventGroups(np.stack([g.offsets for g in groups]), np.stack([g.members for g in groups]))

    def loss(params, batch):
        hidden = hidden_states(params, config.config, batch.tokens, batch.positions, batch.segment_ids)
        head, layout = head_kernel(params, config.config)
        return batch_fusion_loss(hidden, head, batch, groups, head_layout=layout, max_members=64)[0]

    batch = loader.batch(0)
    return batch, jax.jit(jax.value_and_grad(loss))(config.params, batch)


def test_masked_positions_have_no_influence_at_all(run):
    records = [r for r in RecordReader(run.fused_dir("mixed")) if (r.arrays["mask"] == 0).any()][:12]
    rng = np.random.default_rng(0)
    changed = []
    for record in records:
        arrays = {name: array.copy() for name, array in record.arrays.items()}
        hidden = arrays["mask"] == 0
        arrays["labels"][hidden] = rng.integers(0, 300, hidden.sum())
        arrays["ids"][hidden] = rng.integers(0, 300, arrays["ids"][hidden].shape)
        arrays["logprobs"][hidden] = -rng.uniform(2, 9, arrays["logprobs"][hidden].shape)
        arrays["residual_logprob"][hidden] = -0.5
        arrays["partition"][hidden], arrays["weights"][hidden] = 0, 1.0
        changed.append(Record(record.doc_id, record.header, arrays))
    batch, (before, gradient) = _gradients(run, records)
    other, (after, same) = _gradients(run, changed)
    assert (batch.labels != other.labels).any() and (np.asarray(batch.mask) > 0).any()
    assert np.asarray(before).tobytes() == np.asarray(after).tobytes() and np.isfinite(before)
    for left, right in zip(jax.tree.leaves(gradient), jax.tree.leaves(same), strict=True):
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right))
    trained = [Record(r.doc_id, r.header, r.arrays | {"labels": (r.arrays["labels"] + r.arrays["mask"]) % 300})
               for r in records]  # fmt: skip
    assert float(_gradients(run, trained)[1][0]) != float(before)


def test_it_trains_and_is_evaluated_on_what_is_trained(run):
    train(run)
    result = evaluate_run(run)
    table = result["bits_per_byte"]
    assert list(table)[-3:] == ["ensemble", "ensemble-weighted", "ensemble-top1"]
    assert set(table["target"]) == {"chat", "spans", "plain", "mean"}
    assert set(result["documents"]) == set(table) and result["documents"]["target"]["count"] > 3
    _check_ensembles(run, result)
    assert all(np.isfinite(list(row.values())).all() for row in table.values())
    for record, document in zip(
        RecordReader(run.directory / "scores" / "target"), read_corpus(run.corpus_dir, "test"), strict=True
    ):
        assert record.header["n_bytes"] == document.trained_bytes


def test_the_export_talks_by_the_template_that_it_was_trained_on(run, capsys):
    train(run)
    out = Path(export_run(run)["export"])
    ours, exported = run.encoder(run.config.target).template, template_of(load_tokenizer(out))
    talk = [("user", "the cat"), ("assistant", "sat on"), ("user", "a mat"), ("assistant", "May")]
    assert exported.render(talk) == ours.render(talk)
    written = (out / "chat_template.jinja").read_text()
    assert json.loads((out / "tokenizer_config.json").read_text())["chat_template"] == written
    eos = run.tokenizer(run.config.target).eos_id
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [eos]
    assert main(["chat", str(out), "--message", "the cat", "--max-new-tokens", "4", "--json"]) == 0
    assert "answer" in json.loads(capsys.readouterr().out.splitlines()[-1])
    stamp = (out / "manifest.json").stat().st_mtime_ns
    export_run(run)
    assert (out / "manifest.json").stat().st_mtime_ns == stamp
    target = run.config.target.model_copy(update={"chat_template": "llama-2"})
    export_run(Run(run.config.model_copy(update={"target": target})))
    assert "[INST]" in (out / "chat_template.jinja").read_text()


def _check_ensembles(run, result):
    """Weights from the valid split, and one model per document by its prompt, recomputed from what is stored."""
    members = ["source:a", "source:b", "target"]
    documents = {split: read_corpus(run.corpus_dir, split) for split in ("test", "valid")}

    def stored(part, name):
        place = run.directory / part / name.replace(":", "-")
        return {r.header["index"]: (-float(r.arrays["realised_logprob"].sum(dtype=np.float64)), r.header["n_bytes"])
                for r in RecordReader(place)}  # fmt: skip

    valid = [stored("scores-valid", name) for name in members]
    for domain, weights in result["ensembles"]["ensemble-weighted"]["weights"].items():
        of = [i for i, d in enumerate(documents["valid"]) if d.domain == domain]
        of = of or list(range(len(documents["valid"])))
        rates = [sum(v[i][0] for i in of) / np.log(2) / sum(v[i][1] for i in of) for v in valid]
        expected = np.exp(-np.array(rates)) / np.exp(-np.array(rates)).sum()
        np.testing.assert_allclose([weights[name] for name in members], expected, rtol=1e-6)
    test, prompts = ([stored(part, name) for name in members] for part in ("scores", "scores-prompt"))
    total: dict[str, np.ndarray] = {}
    for index, document in enumerate(documents["test"]):
        assert (index in prompts[0]) == (document.spans is not None)
        if document.turns:  # contents alone, whatever stands around them
            assert prompts[0][index][1] == prompts[2][index][1] == document.turns[0].stop
        by = prompts if document.spans is not None else test
        best = min(range(3), key=lambda m: by[m][index][0] / by[m][index][1])
        total[document.domain] = total.get(document.domain, np.zeros(2)) + test[best][index]
    for domain, (nats, size) in total.items():
        assert result["bits_per_byte"]["ensemble-top1"][domain] == pytest.approx(nats / np.log(2) / size, rel=1e-6)
    facts = result["ensembles"]["ensemble-top1"]
    masked = sum(d.spans is not None for d in documents["test"])
    assert (facts["by_prompt"], facts["by_document"]) == (masked, len(documents["test"]) - masked)
    assert sum(facts["chosen"].values()) == len(documents["test"])
    plain = result["bits_per_byte"]["ensemble-top1"]["plain"]
    assert plain <= min(result["bits_per_byte"][name]["plain"] for name in members), "on plain text it is a bound"


@pytest.mark.slow
def test_the_papers_alignment_takes_conversations_too(tmp_path):
    config = _config(tmp_path, align={"positions": "dtw", "vocabulary": "statistics"})
    corpus = config.corpus.model_dump(mode="json") | {"max_train_bytes": 900}
    made = Run(config.model_copy(update={"corpus": CorpusConfig.model_validate(corpus)}))
    made.start()
    for stage in (prepare, capture, align, fuse):
        stage(made)
    for record in RecordReader(made.fused_dir("mixed")):
        hidden = record.arrays["mask"] == 0
        assert (record.arrays["partition"][hidden] == -1).all()


def test_a_conversation_without_a_template_is_refused_before_anything_is_computed(tmp_path):
    config = _config(tmp_path)
    corpus = config.corpus.model_copy(update={"chat_template": None})
    made = Run(config.model_copy(update={"corpus": corpus}))
    made.start()
    prepare(made)
    with pytest.raises(InputError, match="has no chat template"):
        capture(made)
