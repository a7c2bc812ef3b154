"""Conditioned positions and chains through a whole run: aligned, fused, in the loss."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusejax.alignment import event_groups
from fusejax.config import FusionConfig, load_config
from fusejax.data.corpus import read_corpus
from fusejax.data.loader import FusionLoader
from fusejax.errors import InputError
from fusejax.io.manifest import read_manifest
from fusejax.io.store import Record, RecordReader, RecordWriter
from fusejax.losses.fused import batch_fusion_loss
from fusejax.stages.context import Run
from fusejax.stages.fuse import PARTITIONS, fuse_document
from fusejax.stages.run import run_stages
from fusejax.types import EventGroups
from tests.alignment.test_transport import captured
from tests.stages.tiny import make_config, make_model

FUSIONS = [{"name": "fused", "window_bytes": 32}, {"name": "mixed", "method": "avg_ce"}]


def capture_by_hand(run, name):
    """A captured source that gives the true next token half of the mass; no model is run."""
    tokenizer = run.tokenizer(run.participants[name])
    settings = {"tokenizer": tokenizer.fingerprint}
    writer = RecordWriter(run.captured_dir(name), kind="captured", settings=settings, shard_size=8)
    rng = np.random.default_rng(0)
    for document in read_corpus(run.corpus_dir, "train"):
        arrays = captured(tokenizer.encode(document.text), rng, 4, tokenizer.vocab_size)
        arrays["realised_logprob"] = -rng.exponential(size=len(arrays["tokens"])).astype(np.float32)
        header = {"n_bytes": document.n_bytes, "nll_nats": 0.0}
        writer.write(Record(document.id, header, arrays))
    writer.finish(facts={})


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    root = tmp_path_factory.mktemp("chain")
    switches = {"align": {"conditioned": True, "chain": True}, "capture": {"codec": "float32", "shard_size": 8}}
    config = make_config(root, **switches, merge=None, fusions=FUSIONS)
    shutil.rmtree(root / "a")
    make_model(root / "a", kind="byte_bpe", seed=3, vocab_size=290)  # cuts words that the target knows
    run = Run(config)
    run_stages(config, ("prepare",))
    for name in ("a", "b"):
        capture_by_hand(run, name)
    run_stages(config, ("align", "fuse"))
    return root / "run"


def test_aligned_records_hold_chains_and_conditioned_positions(finished_run):
    directory = finished_run
    assert read_manifest(directory / "aligned" / "b").facts["conditioned"] > 0
    reader = RecordReader(directory / "aligned" / "a", kind="aligned")
    symbols = np.load(directory / "aligned" / "a" / "vocabulary.npz")["symbol_of_target"]
    chains = 0
    for record in reader:
        arrays = record.arrays
        live = np.isfinite(arrays["chain_logprob"])
        assert (arrays["status"][live] == 1).all() and (arrays["chain_logprob"][live] <= 0).all()
        assert (symbols[arrays["labels"][live]] != arrays["labels"][live]).all()
        chains += int(live.sum())
    assert chains > 0


@pytest.mark.parametrize(("fusion", "sources"), [("fused", ["a", "b"]), ("mixed", ["a", "b"])])
def test_fused_records_have_a_slot_per_chain(finished_run, fusion, sources):
    directory = finished_run
    reader = RecordReader(directory / "fused" / fusion, kind="fused")
    aligned = [RecordReader(directory / "aligned" / name) for name in sources]
    tables = np.load(reader.directory / PARTITIONS)["symbol_of_target"]
    np.testing.assert_array_equal(tables[-1], np.arange(tables.shape[1]))
    half, live_chains = (1 if fusion == "fused" else 2), 0
    for number, record in enumerate(reader):
        arrays = record.arrays
        assert arrays["ids"].shape[1] == 2 * half == arrays["weights"].shape[1]
        base, chain = arrays["partition"][:, :half], arrays["partition"][:, half:]
        assert set(chain.ravel().tolist()) <= {-1, len(sources)} and base.max() < len(sources)
        live = chain >= 0
        assert (base[live] >= 0).all()
        np.testing.assert_array_equal(arrays["weights"][:, half:], np.where(live, arrays["weights"][:, :half], 0))
        rows, slots = np.nonzero(live)
        np.testing.assert_array_equal(arrays["ids"][rows, half + slots, 0], arrays["labels"][rows])
        assert (arrays["ids"][rows, half + slots, 1:] == -1).all()
        stored = np.stack([source[number].arrays["chain_logprob"] for source in aligned])
        p = np.exp(arrays["logprobs"][rows, half + slots, 0].astype(np.float64))
        np.testing.assert_allclose(p, np.exp(stored[base[rows, slots], rows].astype(np.float64)), atol=1e-3)
        rest = np.exp(arrays["residual_logprob"][rows, half + slots].astype(np.float64))
        np.testing.assert_allclose(p + rest, 1, atol=1e-3)
        live_chains += len(rows)
    assert live_chains > 0
    assert sum(reader.manifest.facts["wins"].values()) >= reader.manifest.facts["supervised"]


@pytest.mark.once
def test_a_chain_adds_its_binary_divergence_to_the_loss(finished_run):
    """The difference that the chain slots make is the sum of KL({label, else}) by hand, in float64."""
    directory = finished_run
    reader = RecordReader(directory / "fused" / "fused", kind="fused")
    tables = [event_groups(row) for row in np.load(reader.directory / PARTITIONS)["symbol_of_target"]]
    groups = EventGroups(np.stack([g.offsets for g in tables]), np.stack([g.members for g in tables]))
    batch = FusionLoader(reader, batch_size=24, seq_len=32, prefetch=0).batch(0)
    rng = np.random.default_rng(0)
    vocab = tables[0].members.size
    hidden = rng.normal(size=(24, 32, 8)).astype(np.float32)
    head = rng.normal(size=(8, vocab)).astype(np.float32)
    without = batch._replace(partition=np.where(batch.partition == 2, -1, batch.partition))
    options = {"clm_weight": 0.5, "fusion_weight": 0.5, "max_members": vocab, "denominator": 1.0}
    whole, bare = (
        batch_fusion_loss(jnp.asarray(hidden), jnp.asarray(head), b, groups, **options)[0] for b in (batch, without)
    )
    logits = hidden.astype(np.float64) @ head
    q = np.exp(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    live = (batch.partition[..., 1] == 2) & (batch.mask != 0)
    p = np.exp(batch.targets.logprobs[..., 1, 0].astype(np.float64))[live]
    of_label = np.take_along_axis(q, batch.labels[..., None], -1)[..., 0][live]
    expected = (p * np.log(p / of_label) + (1 - p) * np.log((1 - p) / (1 - of_label))).sum()
    assert live.sum() > 3
    np.testing.assert_allclose(float(whole) - float(bare), 0.5 * expected, rtol=2e-3)
    slope = jax.grad(lambda h: batch_fusion_loss(h, jnp.asarray(head), batch, groups, **options)[0])(
        jnp.asarray(hidden)
    )
    assert np.isfinite(slope).all() and (np.abs(slope).sum(-1) > 0)[live].all()


def test_without_chains_nothing_is_added(finished_run):
    directory = finished_run
    records = [RecordReader(directory / "aligned" / name)[0] for name in ("a", "b")]
    for record in records:
        record.arrays.pop("chain_logprob")
    plain = fuse_document(records, FusionConfig())
    assert plain["ids"].shape[1] == 1 and plain["weights"].sum(1).max() == 1


def test_conditioning_needs_the_coarse_alphabet(finished_run):
    config = load_config(finished_run / "config.yaml")
    align = config.align.model_copy(update={"vocabulary": "exact", "chain": False})
    with pytest.raises(InputError, match="needs vocabulary 'coarse'"):
        run_stages(config.model_copy(update={"align": align}), ("align",))
