"""Dense targets, fusion and losses give what the collators and trainers of FuseLLM and FuseChat gave."""

import re
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
import sentencepiece
import tokenizers

from fusejax.alignment.parity.fusion import (
    avg_ce_weights,
    dense_target,
    min_ce_choice,
    rewards,
)
from fusejax.alignment.parity.split import split_text
from fusejax.distributions import topk_from_logits
from fusejax.distributions.weighing import choose_min
from fusejax.losses import fusion_loss
from fusejax.merging import merge_leaf, merge_trees
from fusejax.types import TopK
from tests.golden.test_alignment_golden import ROOT, load
from tests.merging.oracle import bf16_step
from tests.paths import DATA, needs_data

pytestmark = pytest.mark.skipif(not ROOT.is_dir(), reason=f"golden alignments are not at {ROOT}")


def log_softmax(logits) -> np.ndarray:
    shifted = np.asarray(logits, np.float64)
    shifted = shifted - shifted.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def divergence(target: np.ndarray, student: np.ndarray, kind: str) -> np.ndarray:
    own = np.log(np.where(target > 0, target, 1.0)) if kind == "kl" else 0.0
    return (target * (own - student)).sum(axis=-1)


def masked_mean(values: np.ndarray, mask: np.ndarray) -> float:
    return float((values * mask).sum() / mask.sum())


def targets_of(rows, prefixes, *, vocab, temperature, length):
    """[S, B, T, V]: the dense targets of each source (the target's own first), built from the rows."""
    own = [
        dense_target(row["per_step_indices"], row["per_step_logits"], vocab, temperature=temperature,
                     length=length, reference_bugs=True) for row in rows
    ]  # fmt: skip
    made = {"base": np.stack(own)}
    for name, (ids, logits) in prefixes.items():
        made[name] = np.stack([
            dense_target(row[ids][:length], row[logits][:length], vocab, temperature=temperature, length=length,
                         instead=instead, reference_bugs=True) for row, instead in zip(rows, own, strict=True)
        ])  # fmt: skip
    return made


FUSELLM = {
    "base": ("with_base", "metric_ce", "base_target_dist"),
    "0": ("with_0", "metric_ce_aligned_0", "aligned_target_dist_0"),
    "1": ("with_1", "metric_ce_aligned_1", "aligned_target_dist_1"),
}


@pytest.mark.parametrize("number", range(6))
def test_fusellm_losses(number):
    golden = load("fusellm_collate_loss")
    case, length, vocab = golden["cases"][number], golden["max_length"], golden["V"]
    rows = load("fusellm_packing")["blocks"][:2]
    names = {str(m): (f"per_step_aligned_indices_{m}", f"per_step_aligned_logits_{m}") for m in (0, 1)}
    made = targets_of(rows, names, vocab=vocab, temperature=case["temperature"], length=length)
    used = [name for name, (flag, _, _) in FUSELLM.items() if case[flag]]
    for name in used:  # computed in bfloat16 there and here: two roundings apart at most
        wanted = np.array(case["dists"][FUSELLM[name][2]])
        np.testing.assert_allclose(made[name], wanted, rtol=2**-6, atol=1e-6)
    metrics = np.array([case["metrics"][FUSELLM[name][1]] for name in used])
    stored = np.stack([case["dists"][FUSELLM[name][2]] for name in used])
    student, mask = log_softmax(case["model_logits"]), np.array(case["attention_mask"])
    for loss in case["losses"]:
        fused, progress = fuse_dense(stored, metrics, loss["fusion"]), loss["step"] / loss["max_steps"]
        weight = loss["lm_loss_weight"]
        weight += (1 - weight) * progress if loss["fusion"].endswith("decay") else 0.0
        value = masked_mean(divergence(fused, student, loss["loss_type"]), mask)
        tolerance = 1e-9 if loss["fusion"].startswith("min") else 2e-3
        assert abs(weight * case["clm_loss"] + (1 - weight) * value - loss["f64_targets"]) < tolerance, loss


def fuse_dense(targets: np.ndarray, metrics: np.ndarray, fusion: str) -> np.ndarray:
    """[S, B, T, V] and [S, B] -> [B, T, V]."""
    if fusion.startswith("min"):
        choice = min_ce_choice(metrics, reference_bugs=True)
        return targets[choice, np.arange(metrics.shape[1])]
    weights = avg_ce_weights(metrics, reference_bugs=True)
    return np.einsum("sb,sbtv->btv", weights, targets)


def test_fusellm_soft_losses():
    golden = load("fusellm_collate_loss")
    case = golden["cases"][0]
    metrics = np.array([case["metrics"][metric] for _, metric, _ in FUSELLM.values()])[:, :1]
    stored = np.stack([case["dists"][name] for _, _, name in FUSELLM.values()])[:, :1]
    student = log_softmax(case["model_logits"])[:1]
    labels = np.array(case["labels"])[0]
    clm = -student[0, np.arange(len(labels) - 1), labels[1:]].mean()
    found = rewards(metrics, reference_bugs=True).astype(np.float64)
    for soft in golden["batch1_soft"]:
        share = found.max() if soft["fusion"] == "min_soft" else found.mean()
        fused = fuse_dense(stored, metrics, soft["fusion"])
        value = divergence(fused, student, "ce").mean()
        assert abs((1 - share) * clm + share * value - soft["f64_targets"]) < 2e-2, soft["fusion"]


@pytest.mark.parametrize("number", range(4))
def test_fusechat_losses(number):
    golden = load("fusechat_collate_loss")
    case, rows, length = golden["cases"][number], golden["rows"], golden["max_length"]
    made = targets_of(
        rows, {"fused": ("fused_per_step_indices", "fused_per_step_logits")},
        vocab=golden["V"], temperature=case["temperature"], length=length,
    )  # fmt: skip
    stored = {name: np.array(case["dists"][f"{name}_target_dist"]) for name in ("base", "fused")
              if f"{name}_target_dist" in case["dists"]}  # fmt: skip
    for name, wanted in stored.items():
        np.testing.assert_allclose(made[name], wanted, rtol=2**-6, atol=1e-6)
    metrics = np.array([[row[name] for row in rows] for name in ("metric_ce", "fused_metric_ce")])
    if case["with_base"]:
        fused = fuse_dense(np.stack([stored["base"], stored["fused"]]), metrics, "min")
    else:
        fused = stored["fused"]
    labels = np.array([row["labels"] for row in rows])
    mask = np.zeros(labels.shape)
    mask[:, :-1] = labels[:, 1:] != -100
    student = log_softmax(case["model_logits"])
    for loss in case["losses"]:
        value = masked_mean(divergence(fused, student, loss["loss_type"]), mask)
        weight = loss["lm_loss_weight"]
        assert abs(weight * case["clm_loss"] + (1 - weight) * value - loss["value"]) < 1e-9, loss


def test_our_loss_is_the_papers():
    """`fusion_loss` with `tail="renormalize"` on the sparse rows is the dense loss of the papers (no bfloat16)."""
    golden = load("fusechat_collate_loss")
    case, rows, length = golden["cases"][0], golden["rows"], golden["max_length"]
    logits = np.array(case["model_logits"])
    labels = np.array([row["labels"] for row in rows])
    following = np.concatenate([labels[:, 1:], np.full((len(rows), 1), -100)], axis=1)
    mask = (following != -100).astype(np.float32)
    dense = np.stack(
        [dense_target(r["per_step_indices"], r["per_step_logits"], golden["V"], length=length) for r in rows]
    )
    raw = np.array([r["per_step_logits"] for r in rows])
    sparse = TopK(
        np.array([r["per_step_indices"] for r in rows], np.int32),
        (log_softmax(raw) + np.log(0.75)).astype(np.float32),
        np.full(labels.shape, np.log(0.25), np.float32),
    )
    loss, _ = fusion_loss(
        logits.astype(np.float32), np.maximum(following, 0), sparse, mask,
        clm_weight=0.9, fusion_weight=0.1, tail="renormalize",
    )  # fmt: skip
    wanted = 0.9 * case["clm_loss"] + 0.1 * masked_mean(divergence(dense, log_softmax(logits), "kl"), mask)
    assert abs(float(loss) - wanted) < 1e-4


def test_forward():
    """Top-k and cross-entropy of the stub model: the reference's float16, ours float32."""
    golden = load("fusellm_forward")
    table = np.array(golden["table"], np.float32)
    for sample in golden["samples"]:
        ids = np.array(sample["input_ids"])
        logits = table[ids]
        stored = np.array(sample["per_step_topk_logits"])[: len(ids)]
        found = topk_from_logits(logits, golden["k"])
        shift = np.log(np.exp(logits.astype(np.float64)).sum(axis=1))
        np.testing.assert_allclose(np.asarray(found.logprobs) + shift[:, None], stored, rtol=1e-3, atol=2e-3)
        rounded = np.take_along_axis(logits, np.array(sample["per_step_topk_ids"])[: len(ids)], axis=1)
        np.testing.assert_array_equal(rounded.astype(np.float16), stored.astype(np.float16))
        nats = -log_softmax(logits)[np.arange(len(ids) - 1), ids[1:]]
        np.testing.assert_allclose(sample["per_step_metric_ce"][: len(nats)], nats, rtol=2e-3, atol=6e-3)
        assert abs(nats.mean() - sample["metric_ce"]) < 6e-3 * nats.mean()


@needs_data
def test_split():
    """FuseLLM's splitting; its cuts inside characters and lost spaces included."""
    golden = load("fusellm_split")
    tokenizers = [sentencepiece_model(), byte_fallback_bpe(load("vocabs/llama_sp8k")), byte_level()]
    for sample in golden["samples"]:
        pieces = split_text(sample["text"], tokenizers, block_size=golden["block_size"])
        assert pieces == sample["pieces"], sample["id"]
        assert (len(pieces) > 1) or sample["lossless"]


def sentencepiece_model():
    """Mistral's tokenizer; a first piece loses one space to `transformers` and one to sentencepiece."""
    model = sentencepiece.SentencePieceProcessor(str(DATA / "tokenizers/mistral-v1/tokenizer.model"))

    def decode(ids: list[int]) -> str:
        pieces = [model.id_to_piece(i) for i in ids]
        return model.decode_pieces([pieces[0].removeprefix("\u2581"), *pieces[1:]])

    return model.encode, decode


def byte_fallback_bpe(pieces: list[str]):
    """Sentencepiece BPE from its pieces alone: pairs are joined in the order of ids."""
    rank = {piece: index for index, piece in enumerate(pieces)}

    def encode(text: str) -> list[int]:
        parts = list("▁" + text.replace(" ", "▁"))
        while joins := [(rank[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in rank]:
            _, at = min(joins)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return [i for part in parts for i in ([rank[part]] if part in rank else [3 + b for b in part.encode()])]

    def decode(ids: list[int]) -> str:
        parts = [bytes([i - 3]) if 3 <= i < 259 else pieces[i].encode() for i in ids]
        parts[0] = parts[0].removeprefix("▁".encode())
        text = b"".join(parts).decode(errors="surrogateescape")  # one U+FFFD for each byte of a cut character
        return re.sub("[\udc80-\udcff]", "\ufffd", text).replace("▁", " ").removeprefix(" ")

    return encode, decode


def byte_level():
    """GPT-2's tokenizer."""
    tokenizer = tokenizers.Tokenizer.from_file(str(DATA / "tokenizers/gpt2/tokenizer.json"))
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids, tokenizer.decode


def test_source_choice():
    golden = load("fusechat_minCE_multi")
    metrics = np.array([[np.nan if x is None else x for x in row] for row in golden["source_metrics"]])
    assert choose_min(metrics).tolist() == golden["chosen_source"]
    assert min_ce_choice(metrics).tolist() == golden["chosen_source"]
    chosen = metrics[golden["chosen_source"], np.arange(metrics.shape[1])]
    assert np.flatnonzero(~np.isnan(chosen)).tolist() == golden["kept_after_filter"]


@pytest.mark.optimized  # variances at the threshold
@pytest.mark.parametrize("number", range(16))
def test_sce(number):
    case = load("sce")["cases"][number]
    dtype = {"bfloat16": ml_dtypes.bfloat16}.get(case["dtype"], case["dtype"])
    base = np.array(case["base"]).astype(dtype)
    models = [np.array(model).astype(dtype) for model in case["models"]]
    if "embed" in case["param_name"]:  # cut to the base, as the reference does; smaller ones are left out
        models = [model[: base.shape[0], : base.shape[1]] for model in models]
    models = [model for model in models if model.shape == base.shape]
    for variant, wanted in (("fuseai", case["out"]), ("mergekit", case.get("upstream_out"))):
        if wanted is None or not models:
            continue
        params = {"select_topk": case["select_topk"], "variant": variant}
        merged = np.asarray(merge_leaf(case["param_name"], base, models, method="sce", params=params), np.float64)
        wanted = np.array(wanted, np.float64)
        merged = np.broadcast_to(merged, wanted.shape)  # upstream repeats its result per model where k = 0
        if case["name"] == "variance_ties":  # equal variances: which of them are taken is torch's affair
            merged, wanted = np.sort(merged, axis=None), np.sort(wanted, axis=None)
        if case["dtype"] == "bfloat16":  # there every product is rounded, so a variance may cross the threshold
            off = np.abs(merged - wanted) > 2 * bf16_step(wanted)
            assert off.mean() <= 0.05, (case["name"], variant)
        else:
            tolerance = 2e-6 * np.abs(wanted).max()
            np.testing.assert_allclose(merged, wanted, rtol=0, atol=tolerance, err_msg=f"{case['name']} {variant}")


GROUPS = {
    "model": lambda name: "",
    "matrix": lambda name: name,
    "layer": lambda name: ".".join(name.split(".")[:3]) if ".layers." in name else None,
    "module": lambda name: ".".join(name.split(".")[:4]) if ".layers." in name else name,
}


def varm_weights(changes: list[dict], granularity: str, *, of_the_paper: bool) -> dict[str, np.ndarray]:
    """{tensor: [J]}: weights by the paper's means over units, or by the program's sums of means over tensors."""
    names = list(changes[0])
    squares = {n: np.array([(c[n].astype(np.float64) ** 2).sum() for c in changes]) for n in names}
    sizes = {n: changes[0][n].size for n in names}
    weights = {}
    for name in names:
        group = GROUPS[granularity](name)
        members = [n for n in names if GROUPS[granularity](n) == group]
        if of_the_paper or granularity == "model":
            total = sum(squares[n] for n in members)
            members = [name] if group is None else members
            total = sum(squares[n] for n in members)
        else:
            total = sum(squares[n] / sizes[n] for n in members) if group is not None else np.zeros(3)
            total = np.zeros(3) if granularity in ("matrix", "module") and (total == 0).any() else total
        weights[name] = total / total.sum() if total.sum() else np.full(3, 1 / 3)
    return weights


@pytest.mark.parametrize("granularity", GROUPS)
def test_varm(granularity):
    """The program's weights explain its output; where they are the paper's, ours is the same model."""
    golden = load("varm")
    models = {name: {k: np.array(v, np.float32) for k, v in m.items()} for name, m in golden["models"].items()}
    base, targets = models["base"], [models[f"t{j}"] for j in range(3)]
    changes = [{name: target[name] - base[name] for name in base} for target in targets]
    theirs, papers = (varm_weights(changes, granularity, of_the_paper=flag) for flag in (False, True))
    merged = merge_trees(base, targets, method="varm", granularity=granularity)
    compared = 0
    for name, value in golden["merges"][f"{granularity}_square"]["out"].items():
        value = np.array(value, np.float64)
        made = sum(w * target[name] for w, target in zip(theirs[name], targets, strict=True))
        allowed = 4 * bf16_step(np.maximum(np.abs(value), 0.5))  # products and sums are rounded there
        assert (np.abs(made - value) <= allowed).all(), name
        if np.abs(theirs[name] - papers[name]).max() < 1e-3:
            assert (np.abs(merged[name] - value) <= allowed).all(), name
            compared += 1
    assert compared >= (8 if granularity in ("matrix", "model") else 1)
