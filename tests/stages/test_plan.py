"""The plan: the real step on faked devices, memory by items, and golden tables that must not drift."""

import dataclasses
import json
import re
from collections import Counter

import jax
import numpy as np
import pytest

from fusejax.cli import main
from fusejax.config import MemoryConfig
from fusejax.errors import InputError
from fusejax.io.checkpoint import save_train_state
from fusejax.models import ModelConfig, count_params, param_table
from fusejax.models.flops import flops_per_token
from fusejax.models.presets import PRESETS, find_preset
from fusejax.parallel.costs import Assumptions, communication_seconds, step_time, wire_bytes
from fusejax.parallel.device_kinds import DEVICE_KINDS
from fusejax.parallel.hlo import collectives, dot_flops
from fusejax.stages.fit import Optimization
from fusejax.stages.plan import preset_run, run
from fusejax.stages.plan_child import plan, work
from fusejax.stages.plan_disk import disk_assumptions, disk_bytes
from fusejax.stages.plan_memory import layer_bytes, predict
from fusejax.stages.plan_program import Shape, compile_on_host
from fusejax.stages.plan_targets import gpu_target, tpu_topology
from fusejax.stages.plan_text import render
from fusejax.stages.plan_traffic import memory_traffic, optimizer_bytes
from tests.paths import ROOT
from tests.stages.tiny import make_config

GOLDEN = ROOT / "docs" / "results" / "plan_golden.json"
TINY = ModelConfig(1024, 256, 512, 4, 8, 4, dtype="bfloat16", remat="full")
LOSS = {"clm_weight": 0.9, "fusion_weight": 0.1}
KEYS = {"params", "optimizer", "activations", "temporaries", "total"}


def shape(model: ModelConfig = TINY, *, data=1, fsdp=8, tensor=1, rows=32, accumulation=2) -> Shape:
    mesh = {"data": data, "fsdp": fsdp, "tensor": tensor}
    return Shape(model, mesh, rows, 128, accumulation, 1, 4, 2, LOSS, Optimization(1e-5))


@pytest.fixture(scope="module")
def compiled():
    return compile_on_host(shape())


def test_parameters_and_moments_are_what_the_compiler_is_given(compiled):
    found = predict(shape())
    batch = (
        32 // 8 * 128 * (4 * 5 + 4 * 8 + 4 + 8)
    )  # five [b, T] arrays, ids and logprobs of 4, rest, partition, weight
    scalars = 16  # step, the optimiser's counts
    assert abs(compiled.argument_bytes - (found.params + found.optimizer + batch)) <= scalars
    assert found.params + found.optimizer == 12 * count_params(TINY) // 8
    assert found.total == sum(v for k, v in found.per_device().items() if k != "total")


def test_tpus_hold_no_scores_and_share_memory():
    one, many = (shape(accumulation=n) for n in (1, 2))
    for asked in (one, many):
        found, added = predict(asked, tpu=True), predict(asked)
        assert found.total < added.total and found.params == added.params and found.optimizer == added.optimizer
        assert found.temporaries == sum(found.items.values())
    plain = many._replace(model=dataclasses.replace(TINY, attention="xla"))
    assert predict(plain, tpu=True).temporaries > predict(many, tpu=True).temporaries


@pytest.mark.once
def test_narrow_moments_and_parameters_are_counted():
    narrow = shape()._replace(optimization=Optimization(1e-5, moments_dtype="bfloat16", param_dtype="bfloat16"))
    found, wide = predict(narrow), predict(shape())
    parameters = count_params(TINY) // 8
    assert (found.params, found.optimizer) == (2 * parameters, 8 * parameters)
    assert found.activations == wide.activations and found.temporaries < wide.temporaries
    compiled = compile_on_host(narrow)
    assert abs(compiled.argument_bytes - 10 * parameters - 32 // 8 * 128 * 64) <= 16, "and the batch, as above"
    dtypes = {c.dtypes for c in collectives(compiled.program) if c.kind == "all-gather" and c.bytes > 4 * 256}
    assert dtypes == {"bf16", "s32"}, "weights, and the ids that the embedding is read by"


@pytest.mark.slow
def test_moments_in_eight_bits_are_counted_with_their_rows():
    coded = shape(tensor=2, fsdp=4)._replace(optimization=Optimization(1e-5, moments_dtype="int8"))
    found, parameters = predict(coded), count_params(TINY) // 8
    assert 2 * parameters < found.optimizer < 2.1 * parameters
    compiled, batch = compile_on_host(coded), 32 // 4 * 128 * 64
    scales = 4 * 256 * (2 * TINY.num_layers + 1)  # norms lie over fsdp alone
    assert abs(compiled.argument_bytes - found.params - found.optimizer - batch) <= scales + 16


def test_layers_are_gathered_twice_and_their_gradients_scattered_once_per_micro_batch(compiled):
    found = collectives(compiled.program)
    layers = (
        sum(2 * leaf for leaf in (256 * 256 * 2, 256 * 128 * 2, 3 * 256 * 512)) * TINY.num_layers
    )  # bytes in bfloat16: q and o, k and v, the feed-forward part
    gathered = sum(c.bytes * c.count for c in found if c.kind == "all-gather" and c.dtypes == "bf16")
    scattered = sum(c.bytes * c.count for c in found if c.kind == "reduce-scatter" and c.dtypes == "bf16")
    assert gathered == 2 * 2 * layers + 2 * 256 * 1024, "and the head once, before the micro-batches"
    assert scattered == 2 * layers


def test_the_heads_gradient_is_scattered_and_the_embedding_stays_where_it_is(compiled):
    found = collectives(compiled.program)
    wide = [(c.kind, c.bytes, c.count) for c in found if c.dtypes == "f32" and c.bytes >= 4 * 256 * 32]
    assert wide == [("reduce-scatter", 4 * 256 * 1024, 2)], "the head's gradient, of every micro-batch"
    rows = 2 * 2 * 128 * 256  # bfloat16, two rows of a micro-batch
    assert [(c.bytes, c.count) for c in found if c.kind == "all-to-all"] == [(rows, 2)] * 2, "forward and back"


def test_the_state_of_the_step_before_is_given_to_the_one_after(compiled):
    assert abs(compiled.reused_bytes - 12 * count_params(TINY) // 8) <= 16


def test_operations_counted_in_the_program_are_those_of_the_formula(compiled):
    counted = dot_flops(compiled.program) * 8 / (32 * 128)
    needed = flops_per_token(TINY, 128)
    again = 2 * (needed / 6)  # full rematerialisation runs the forward pass twice
    assert counted == pytest.approx(needed + again, rel=0.1)


def test_no_device_holds_logits_of_all_its_tokens(compiled):
    tokens, vocab = 2 * 128, TINY.vocab_size
    wide = [
        op.shape
        for inside in compiled.program.computations.values()
        for op in inside.values()
        for dims in re.findall(r"\[([\d,]+)\]", op.shape)
        if dims.endswith(f",{vocab}")
        and dims not in (f"256,{vocab}", f"32,{vocab}", f"2,{vocab}")
        and int(dims.split(",")[0]) >= tokens
    ]
    assert not wide


SMALL = ModelConfig(512, 64, 128, 2, 4, 2, dtype="bfloat16", remat="full")


@pytest.mark.parametrize("fsdp", [pytest.param(2, marks=pytest.mark.slow), 8])
def test_state_falls_with_the_number_of_shards_and_rows_do_not(fsdp):
    """The compiled step's own arguments: a 1 / fsdp part of the state, and the same rows on each device."""
    asked = shape(SMALL, fsdp=fsdp, rows=4 * fsdp, accumulation=1)
    compiled = compile_on_host(asked)
    state = compiled.argument_bytes - 4 * 128 * 64
    assert state == pytest.approx(12 * count_params(SMALL) / fsdp, rel=0.01)
    assert compiled.reused_bytes == pytest.approx(state, rel=0.01)
    assert predict(asked).activations == predict(shape(SMALL, fsdp=1, rows=4, accumulation=1)).activations


def test_a_split_stream_is_gathered_and_scattered_over_tensor():
    """Without it every projection back to the stream ends in an all-reduce of all positions.

    Where `Layout.spread` or `whole` does nothing, norms gather float32 or gradients are scattered one projection at
    a time, so the numbers are held from both sides.
    """
    plain = shape(SMALL, fsdp=1, tensor=2, rows=2, accumulation=1)
    stream, found = 2 * 128 * 64, []  # elements of [rows, T, D]
    for asked in (plain, plain._replace(sequence_parallel=True)):
        counts: Counter[tuple[str, str]] = Counter()
        for c in collectives(compile_on_host(asked).program):
            if c.bytes == stream * {"bf16": 2, "f32": 4}.get(c.dtypes, 0):
                counts[c.kind, c.dtypes] += c.count
        found.append(counts)
    whole, split = found
    layers = SMALL.num_layers
    assert whole["all-reduce", "bf16"] == 5 * layers and not whole["reduce-scatter", "bf16"]
    assert split["reduce-scatter", "bf16"] == 5 * layers and not split["all-reduce", "bf16"]
    assert split["all-gather", "bf16"] == 6 * layers + 2, "and for the loss, forward and back"
    assert not split["all-gather", "f32"], "norms read their own positions"


def test_less_is_kept_by_each_policy_of_rematerialisation():
    kept = [predict(shape(dataclasses.replace(TINY, remat=remat))).activations for remat in ("none", "dots", "full")]
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == 3
    assert kept[-1] == 4 * 2 * 128 * 256 * 2, "the input of each layer"


def test_a_stream_over_tensor_keeps_its_part():
    model = dataclasses.replace(TINY, intermediate_size=1024)
    plain = shape(model, fsdp=4, tensor=2, rows=16)
    split = plain._replace(sequence_parallel=True)
    assert 2 * predict(split).activations == predict(plain).activations
    whole = dataclasses.replace(model, remat="none")
    kept = [predict(s._replace(model=whole)).activations for s in (plain, split)]
    array = 16 // 2 // 4 * 128 * 256  # [rows, T, D]; without rematerialisation the inputs of projections stay whole
    assert (kept[0] - kept[1]) % array == 0 and kept[1] < kept[0]
    assert predict(shape()) == predict(shape()._replace(sequence_parallel=True)), "nothing where tensor is 1"


def test_speed_follows_from_the_program_and_the_assumptions(compiled):
    kind, shares = DEVICE_KINDS["A100-40G"], Assumptions()
    found = work(shape(), kind, compiled)
    moved, seconds = found["memory_traffic"], found["seconds_per_step"]
    local = count_params(TINY) // 8
    assert moved["logits"] == 2 * 3 * 4 * (2 * 128 * 1024), "two micro-batches, three passes, float32"
    assert moved["optimizer"] == (2 * 4 + 2 * 12) * local, "the gradient twice; the state read and written"
    assert moved["gradients"] == 2 * (4 + 4 + 8) * local, "written; read, and added to a float32 sum"
    assert moved["layers"] == 2 * 4 * 4 * layer_bytes(shape())
    assert seconds["memory"] == pytest.approx(sum(moved.values()) / (0.8 * kind.hbm_bandwidth), abs=1e-6)
    flops = found["flops_per_token_program"] * 32 * 128 / 8
    assert seconds["compute"] == pytest.approx(flops / (0.6 * kind.bf16_flops), abs=1e-6)
    found_bytes = collectives(compiled.program)
    sent = communication_seconds(found_bytes, kind, link_share=0.8)
    assert seconds["communication"] == pytest.approx(sent, abs=1e-6)
    assert seconds["without_overlap"] == pytest.approx(seconds["compute"] + seconds["memory"] + sent, abs=2e-6)
    assert found["tokens_per_second"]["expected"] == pytest.approx(32 * 128 / seconds["expected"], rel=0.01)
    table = sum(row["wire_bytes"] for row in found["collectives"])
    assert found["collective_bytes"] == wire_bytes(found_bytes) == pytest.approx(table, abs=len(found["collectives"]))
    assert found["assumptions"] == dataclasses.asdict(shares) | {"usable_share": 0.92} | {
        "optimizer_bytes_per_parameter": 32
    }


@pytest.mark.parametrize("moments", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("params", ["float32", "bfloat16"])
def test_an_update_reads_and_writes_the_state(moments, params):
    memory = MemoryConfig(moments_dtype=moments, param_dtype=params)
    options = Optimization(1e-5, moments_dtype=moments, param_dtype=params)
    assert optimizer_bytes(options, accumulation=2) == 2 * memory.state_bytes + 2 * 4
    assert optimizer_bytes(options, accumulation=1) == 2 * memory.state_bytes + 2 * (4 if params == "float32" else 2)


def test_traffic_knows_rematerialisation_and_the_dtype_of_logits():
    asked = shape()
    less = asked._replace(model=dataclasses.replace(TINY, remat="none"), loss=LOSS | {"logits_dtype": "bfloat16"})
    found, before = (memory_traffic(s, Assumptions()) for s in (less, asked))
    assert found["layers"] * 4 == before["layers"] * 3 and found["logits"] * 2 == before["logits"]


def golden_rows() -> list[dict]:
    return json.loads(GOLDEN.read_text())["rows"] if GOLDEN.is_file() else []


@pytest.mark.parametrize("row", golden_rows(), ids=lambda r: "-".join(r["shape"]))
def test_the_golden_tables_are_what_the_code_predicts(row):
    """All but the program itself is computed anew: memory, disk, and speed from the committed operations and bytes."""
    golden, kind = row["plan"], DEVICE_KINDS[row["device"]]
    config, model = preset_run(row["shape"][0], golden["mesh"]), PRESETS[row["shape"][0]]
    asked = Shape.of(config, model, golden["mesh"])
    total = predict(asked, tpu=kind.is_tpu).total
    assert total == pytest.approx(golden["predicted_bytes"], rel=0.001)
    assert golden["fits"] == (golden["per_device_bytes"]["total"] <= 0.92 * kind.hbm_bytes)
    assert flops_per_token(model, asked.seq_len) == golden["flops_per_token"]
    assert disk_bytes(config, model, tokens=golden["tokens"]) == golden["disk"]
    assert memory_traffic(asked, Assumptions()) == golden["memory_traffic"]
    seconds = golden["seconds_per_step"]
    flops = golden["flops_per_token_program"] * asked.tokens / asked.devices
    moved = sum(golden["memory_traffic"].values())
    anew = step_time(kind, flops=flops, memory_bytes=moved, collectives=[], assumptions=Assumptions())
    assert max(anew.expected, seconds["communication"]) == pytest.approx(seconds["expected"], rel=0.001)
    assert golden["tokens_per_second"]["expected"] == pytest.approx(asked.tokens / seconds["expected"], rel=0.001)
    assert row["ratio"] is None or 0.9 < row["ratio"] < 1.1, "the sum against the device's own compiler"


@pytest.mark.slow
@pytest.mark.parametrize("program", [0], ids=lambda n: "-".join(golden_rows()[n]["shape"]))
def test_the_program_is_that_of_the_golden_tables(program):
    """Each model once, with and without a tensor axis; that the others follow the same code is tested above."""
    row = golden_rows()[program]
    golden, mesh = row["plan"], row["plan"]["mesh"]
    kind, tokens = DEVICE_KINDS[row["device"]], golden["tokens"]
    found = run(preset_run(row["shape"][0], mesh), mesh, kind=kind, compiler="cpu", tokens=tokens)
    for key in ("collectives", "collective_bytes", "memory_traffic", "predicted_bytes", "fits", "disk"):
        assert found[key] == golden[key], key
    for key in ("seconds_per_step", "tokens_per_second"):
        assert found[key] == pytest.approx(golden[key], rel=0.001), key


@pytest.mark.skipif(not GOLDEN.is_file(), reason="no golden tables")
def test_every_kind_of_device_has_a_predicted_speed():
    kinds = json.loads(GOLDEN.read_text())["kinds"]
    assert {"A100-40G", "A100-80G", "H100-80G", "H200", "v4", "v5e", "v5p", "v6e", "v7x"} <= {
        k["device"] for k in kinds
    }
    for row in kinds:
        # no device does more than its share of the peak that is assumed, recomputation taken off
        assert 0 < row["without_overlap"] <= row["expected"] and 0.05 < row["mfu"] < 0.6 * 6 / 8


def test_the_command_prints_what_is_promised(tmp_path, capsys):
    config = make_config(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(config.model_dump(mode="json")))
    words = ["plan", str(path), "--mesh", "fsdp=2,tensor=1", "--devices", "4", "--compiler", "cpu", "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["devices"] == 4 and found["mesh"] == {"data": 2, "fsdp": 2, "tensor": 1}
    assert set(found["per_device_bytes"]) == KEYS
    assert {"flops_per_token", "collective_bytes", "disk_bytes", "fits"} <= set(found)
    assert found["fits"] is True and found["disk_bytes"] == sum(found["disk"].values())
    assert "Collectives per step" in render(found) and "Note:" not in render(found)


def test_a_train_state_takes_on_disk_what_is_planned(tmp_path):
    config = preset_run("llama-2-7b", {"data": 1, "fsdp": 1, "tensor": 1})
    planned = disk_bytes(config, SMALL, tokens=10**6)["A6 train states"]
    rng = np.random.default_rng(0)  # moments of zeros would be packed to nothing
    table = param_table(SMALL)
    arrays = [{k: rng.normal(size=row.shape).astype(np.float32) for k, row in table.items()} for _ in range(3)]
    save_train_state(tmp_path, 1, dict(zip(("params", "mu", "nu"), arrays, strict=True)), {})
    found = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert 3 * found == pytest.approx(planned, rel=0.1)


@pytest.mark.parametrize(
    ("said", "width"), [({"dtype": "float32"}, 4), ({"torch_dtype": "float16"}, 2), ({"torch_dtype": "bfloat16"}, 2)]
)
def test_models_are_kept_in_the_targets_own_dtype(tmp_path, said, width):
    (tmp_path / "config.json").write_text(json.dumps(said))
    config = preset_run("llama-2-7b", {"data": 1, "fsdp": 1, "tensor": 1})
    config = config.model_copy(update={"target": config.target.model_copy(update={"model": str(tmp_path)})})
    assert disk_bytes(config, TINY, tokens=1000)["A8 export"] == width * count_params(TINY)
    assert disk_assumptions(config)["dtype_of_models"] == next(iter(said.values()))


@pytest.mark.slow
def test_256_devices_and_what_the_plan_is_not_of(tmp_path, capsys):
    config = make_config(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(config.model_dump(mode="json")))
    words = ["plan", str(path), "--mesh", "fsdp=4", "--devices", "256", "--compiler", "cpu", "--device-kind", "v5e"]
    changes = ["--train.batch-size", "256", "--memory.attention", "cudnn", "--train.compute-dtype", "bfloat16"]
    assert main([*words, *changes, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["devices"] == 256 and found["mesh"] == {"data": 64, "fsdp": 4, "tensor": 1}
    assert found["step"]["rows_per_device"] == 1 and found["tokens_per_second"]["expected"] > 0
    assert {row["devices"] for row in found["collectives"]} <= {4, 64, 256}
    assert len(found["notes"]) == 1 and "plain attention" in found["notes"][0]
    text = render(found)
    assert "Note: memory.attention is cudnn" in text and "passes 4 times" in text and "models in float32" in text


@pytest.mark.once
def test_what_does_not_fit_comes_with_what_would():
    mesh = {"data": 1, "fsdp": 2, "tensor": 1}
    config = preset_run("tinyllama-1.1b", mesh)
    config = config.model_copy(update={"train": config.train.model_copy(update={"remat": "none"})})
    small = dataclasses.replace(DEVICE_KINDS["L4"], hbm_bytes=20 * 2**30)
    found = plan(config, mesh, kind=small, compiler="cpu", tokens=10**9)
    assert not found["fits"]
    assert all(entry["total_bytes"] <= found["usable_bytes"] for entry in found["suggestions"])
    assert found["suggestions"][0]["change"].keys() <= {"train.remat", "train.accumulation"}, "the mildest first"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["llama-2-7b", "--device-kind", "A100-39G"], r"unknown device.*Did you mean"),
        (["llama-2-7b", "--mesh", "fsdp=8,tp=2"], r"'tp=2' is no axis"),
        (["llama-2-7b", "--mesh", "fsdp=8", "--devices", "12"], r"no multiple of fsdp \* tensor = 8"),
        (["llama-2-7b", "--mesh", "fsdp=1024"], r"at most 512"),
        (["llama-2-7b", "--mesh", "fsdp=3"], r"must be a multiple"),
        (["llama-2-8b"], r"no configuration file"),
        ([], r"usage: fusejax plan"),
    ],
)
def test_mistakes_are_told_at_once(words, message, capsys):
    assert main(["plan", *words]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_mesh_that_does_not_divide_the_model_is_refused():
    with pytest.raises(InputError, match=r"(?s)kv_heads = 4 over tensor = 8"):
        compile_on_host(shape(fsdp=1, tensor=8))


def test_presets_answer_to_their_names_on_the_hub():
    assert find_preset("meta-llama/Llama-2-7b-hf") is PRESETS["llama-2-7b"]
    assert count_params(PRESETS["llama-2-7b"]) == 6_738_415_616
    assert count_params(PRESETS["mistral-7b"]) == 7_241_732_096
    assert find_preset("./models/mine") is None


def test_compilers_know_the_devices_of_the_golden_tables():
    assert tpu_topology("v5e", 64) == "v5e:8x8" and tpu_topology("v5p", 256) == "v5p:4x8x8"
    assert "NVIDIA A100-SXM4-40GB" in gpu_target(DEVICE_KINDS["A100-40G"])
    with pytest.raises(InputError, match="no slice of 24 chips"):
        tpu_topology("v5e", 24)
    with pytest.raises(InputError, match="no compiler target for L4"):
        gpu_target(DEVICE_KINDS["L4"])
    assert jax.device_count() >= 8
