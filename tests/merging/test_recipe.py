"""Recipes in both forms: what they say of every tensor, and what is refused before any tensor is read."""

import pytest
import yaml

from fusejax.errors import InputError
from fusejax.merging.plan import ModelFacts, TensorRef, TensorSpec
from fusejax.merging.planner import plan_merge
from fusejax.merging.recipe import parse_recipe
from tests.paths import ROOT

PARTS = ("self_attn.q_proj.weight", "mlp.up_proj.weight")


def facts(layers=3, rows=6, *, head=True, dtype="bfloat16", tokens=None, extra=()):
    names = [f"model.layers.{i}.{part}" for i in range(layers) for part in PARTS]
    tensors = {name: TensorSpec((4, 4), dtype) for name in [*names, *extra]}
    tensors["model.norm.weight"] = TensorSpec((4,), dtype)
    for name in ("model.embed_tokens.weight", *(["lm_head.weight"] if head else [])):
        tensors[name] = TensorSpec((rows, 4), dtype)
    return ModelFacts(tensors, tokens)


def plan(text, **models):
    recipe = parse_recipe(yaml.safe_load(text))
    names = {s.model for piece in recipe.slices for s in piece.sources} | ({recipe.base} - {None})
    return plan_merge(recipe, {name: facts() for name in names} | models)


def values(plan, name):
    """The values of one parameter by output tensor."""
    return {step.output: step.parameters.get(name) for step in plan.tensors}


def test_our_form():
    found = plan("{method: ties, base: b, targets: [x, y], parameters: {weights: [1, 2], density: 0.5, scale: 2}}")
    assert found.models == ("b", "x", "y") and found.template == "b" and found.num_layers is None
    assert not found.rows and not found.tokens
    outputs = [step.output for step in found.tensors]
    assert outputs[0] == "model.embed_tokens.weight" and set(outputs[-2:]) == {"model.norm.weight", "lm_head.weight"}
    assert len(outputs) == len(set(outputs)) == 9
    step = found.tensors[3]
    assert step.base == TensorRef("b", step.output)
    assert step.targets == (TensorRef("x", step.output), TensorRef("y", step.output))
    assert step.parameters == {"weights": (1, 2), "density": (0.5, 0.5), "scale": 2}
    assert step.dtype == "bfloat16" and step.method == "ties"


def test_lists_run_over_targets_in_our_form_and_over_layers_in_mergekits():
    ours = plan("{method: linear, targets: [x, y], parameters: {weights: [[0, 1], 0.5]}}")
    theirs = plan("{merge_method: linear, models: [{model: x, parameters: {weight: [0, 1]}}, "
                  "{model: y, parameters: {weight: 0.5}}]}")  # fmt: skip
    expected = {"model.layers.0": 0, "model.layers.1": 0.5, "model.layers.2": 1}
    for found in (ours, theirs):
        for name, weights in values(found, "weights").items():
            # Outside the layers a gradient takes its first entry, at the head too.
            assert weights == (expected.get(name.rsplit(".", 3)[0], 0), 0.5), name


def test_filters_and_precedence():
    text = """
    merge_method: task_arithmetic
    base_model: b
    parameters: {lambda: 0.5, weight: 9}
    slices:
      - parameters: {weight: 7}
        sources:
          - model: x
            layer_range: [0, 2]
            parameters: {weight: [{filter: self_attn, value: [1, 2]}]}
          - {model: y, layer_range: [0, 2]}
      - sources: [{model: x, layer_range: [2, 3]}, {model: y, layer_range: [2, 3], parameters: {weight: [3, 4]}}]
    """
    found = plan(text)
    weights = values(found, "weights")
    assert weights["model.layers.1.self_attn.q_proj.weight"] == (2, 7)  # source, slice
    assert weights["model.layers.1.mlp.up_proj.weight"] == (7, 7)  # no filter matches: the next level
    assert weights["model.layers.2.mlp.up_proj.weight"] == (9, 4)  # shared; a slice of one layer is at its end
    assert weights["lm_head.weight"] == (9, 3)  # from the last slice, at its start
    assert set(values(found, "scale").values()) == {0.5}
    assert found.num_layers == 3
    assert found.tensors[1].base == TensorRef("b", "model.layers.0.self_attn.q_proj.weight")


def test_slices_stack_layers():
    text = """
    merge_method: passthrough
    slices: [{sources: [{model: x, layer_range: [0, 2]}]}, {sources: [{model: y, layer_range: [1, 3]}]}]
    dtype: float16
    """
    found = plan(text)
    sources = {step.output: step.targets[0] for step in found.tensors}
    assert found.num_layers == 4 and found.template == "x"
    assert sources["model.layers.2.mlp.up_proj.weight"] == TensorRef("y", "model.layers.1.mlp.up_proj.weight")
    assert sources["model.embed_tokens.weight"].model == "x" and sources["model.norm.weight"].model == "y"
    assert {step.dtype for step in found.tensors} == {"float16"}


def test_the_base_among_the_models():
    listed = "{merge_method: ties, base_model: b, models: [b, {model: x, parameters: {weight: 1}}]}"
    assert all(step.targets == (TensorRef("x", step.output),) for step in plan(listed).tensors)
    linear = plan("{merge_method: linear, base_model: b, models: [b, x], tokenizer_source: base}")
    assert all(step.base is None and len(step.targets) == 2 for step in linear.tensors)
    assert not linear.notes
    slerp = plan("{merge_method: slerp, base_model: b, models: [x, b], parameters: {t: 0.25}}")
    step = slerp.tensors[0]
    assert step.base and step.base.model == "b" and [ref.model for ref in step.targets] == ["x"]
    assert plan("{method: linear, base: b, targets: [x, y]}").notes


def test_dtypes_are_promoted_unless_chosen():
    mixed = plan("{method: linear, targets: [x, y]}", x=facts(dtype="float16"), y=facts(dtype="bfloat16"))
    assert {step.dtype for step in mixed.tensors} == {"float32"}
    chosen = plan("{method: linear, targets: [x, y], dtype: float32, out_dtype: bfloat16}")
    assert {step.dtype for step in chosen.tensors} == {"bfloat16"}


def test_tied_heads():
    untied = plan("{method: linear, targets: [x, y]}", x=facts(head=False))
    (head,) = [step for step in untied.tensors if step.output == "lm_head.weight"]
    assert head.targets == (TensorRef("x", "model.embed_tokens.weight"), TensorRef("y", "lm_head.weight"))
    tied = plan("{method: linear, targets: [x, y]}", x=facts(head=False), y=facts(head=False))
    assert "lm_head.weight" not in {step.output for step in tied.tensors}


def test_seed_variant_and_notes():
    ours = plan("{method: dare_ties, base: b, targets: [x], seed: 5}")
    assert ours.tensors[0].parameters == {"seed": 5} and not ours.notes
    theirs = plan("{merge_method: dare_ties, base_model: b, models: [x], parameters: {int8_mask: true}}")
    assert theirs.tensors[0].parameters == {"variant": "mergekit"}
    assert len(theirs.notes) == 2
    ram = plan("{merge_method: ramplus_tl, base_model: b, models: [x, y]}").tensors[0]
    assert (ram.method, ram.parameters) == ("ram", {"variant": "ramplus_tl"})


TOKENS = {"a": 0, "b": 1, "c": 2, "d": 3, "e": 4, "f": 5}


def test_vocabularies():
    other = facts(rows=7, tokens={token: (i + 1) % 6 for token, i in TOKENS.items()} | {"g": 6})
    base, text = facts(tokens=TOKENS), "{method: task_arithmetic, base: b, targets: [x]"
    for choice, size, row in (("base", 6, 1), ("union", 7, 1), ("x", 7, 0), ("truncate", 6, 0)):
        found = plan(f"{text}, tokenizer: {choice}}}", b=base, x=other)
        assert len(found.tokens) == size and found.rows["x"][0] == row and found.default_model == "b"
        assert {s.output for s in found.tensors if s.vocabulary} == {"model.embed_tokens.weight", "lm_head.weight"}
    for models in ({"x": other}, {"x": facts(tokens=TOKENS | {"a": 1, "b": 0})}):
        with pytest.raises(InputError, match=r"Choose `tokenizer: base`.*`union`.*`truncate`"):
            plan(text + "}", b=base, **models)
    with pytest.raises(InputError, match="needs the tokenizers of all models"):
        plan(text + ", tokenizer: union}", b=base)
    with pytest.raises(InputError, match="truncate cuts to the 6 rows of b, but there are fewer"):
        plan(text + ", tokenizer: truncate}", x=facts(rows=5))
    assert not plan(text + ", tokenizer: base}", b=base, x=base).rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[a]", "a recipe is a mapping"),
        ("{method: tise, base: b, targets: [x]}", "unknown method 'tise'. Did you mean 'ties'"),
        ("{method: linear, target: [x]}", "unknown key 'target'. Did you mean 'targets'"),
        ("{merge_method: linear, models: [x], dtyp: float32}", "unknown key 'dtyp'. Did you mean 'dtype'"),
        ("{merge_method: linear, method: linear, models: [x]}", "both `method`"),
        ("{method: linear}", "give either `targets` or `slices`"),
        ("{method: linear, targets: []}", "at least one entry"),
        ("{method: linear, targets: [x, x]}", "x is given twice"),
        ("{method: linear, targets: [x], parameters: {wieght: 1}}", "no parameter 'wieght'. Did you mean 'weights'"),
        ("{method: linear, targets: [x, y], parameters: {weights: [1]}}", "one value for each of the 2 targets"),
        ("{method: sce, base: b, targets: [x], parameters: {select_topk: {a: 1}}}", "must be a value, a list"),
        ("{method: sce, base: b, targets: [x], parameters: {select_topk: [{filtre: a}]}}", "Did you mean 'filter'"),
        ("{method: linear, targets: [{model: x, layer_range: [0, 1]}]}", "unknown key 'layer_range'"),
        ("{method: linear, slices: [{sources: [{model: x, layer_range: [1, 1]}]}]}", "layer_range must be"),
        ("{method: linear, targets: [x], modules: {}}", "`modules` is not supported"),
        ("{method: linear, targets: [x], chat_template: chatml}", "`chat_template` is not supported"),
        ("{method: linear, targets: [x], dtype: bf16}", "dtype must be one of"),
        ("{method: linear, targets: [x], seed: 1}", "linear draws nothing"),
        ("{method: linear, targets: [x], tokenizer: {source: base, tokens: {}}}", "unknown key 'tokens'"),
        ("{method: linear, targets: [x], tokenizer: base, tokenizer_source: base}", "give either `tokenizer`"),
    ],
)
def test_bad_recipes_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        parse_recipe(yaml.safe_load(text))


@pytest.mark.parametrize(
    ("text", "models", "message"),
    [
        ("{method: ties, targets: [x]}", {}, "ties needs a base"),
        ("{method: linear, targets: [x, y]}", {"y": facts(layers=2)}, "numbers of layers differ"),
        ("{method: linear, targets: [x, y]}", {"y": facts(extra=["model.bias"])}, "y has model.bias, which x lacks"),
        ("{method: linear, targets: [y, x]}", {"y": facts(extra=["model.bias"])}, "x lacks model.bias"),
        ("{method: linear, targets: [x, y], parameters: {weights: [1, -1]}}", {}, "weights sum to 0"),
        ("{method: sce, base: b, targets: [x], parameters: {select_topk: [0, 2]}}", {}, r"layers\.2.*\[0, 1\], got 2"),
        ("{merge_method: linear, models: [{model: x, parameters: {weight: 1}}, y]}", {}, "weights is set .* not for y"),
        ("{method: slerp, base: b, targets: [x, y]}", {}, "slerp goes from the base to one other model"),
        ("{method: slerp, base: b, targets: [b]}", {}, "slerp takes 1 to 2 targets, got 0"),
        ("{merge_method: ties, base_model: b, models: [{model: b, parameters: {weight: 1}}, x]}", {}, "does not use"),
        ("{merge_method: sce, base_model: b, models: [{model: x, parameters: {select_topk: 1}}, y]}", {}, "one value"),
        ("{method: linear, targets: [x, y]}", {"y": facts(extra=["model.layers.1.mlp.b"])}, "has model.layers.1.mlp.b"),
        ("{method: linear, slices: [{sources: [{model: x, layer_range: [2, 5]}]}]}", {}, "x has 3 layers"),
    ],
)
def test_impossible_plans_are_refused(text, models, message):
    with pytest.raises(InputError, match=message):
        plan(text, **models)


RELEASED = {
    "linear": {"weights": (0.2,) * 5, "normalize": True},
    "task_arithmetic": {"weights": (0.3,) * 5, "normalize": False},
    "ties": {"weights": (0.2,) * 5, "density": (0.6,) * 5, "normalize": True},
    "dare_linear": {"weights": (0.2,) * 5, "density": (0.6,) * 5, "normalize": True, "seed": 0},
    "sce": {"select_topk": 0.1, "variant": "fuseai"},
    "varm": {"granularity": "matrix"},
}


@pytest.mark.parametrize("method", sorted(RELEASED))
def test_the_released_recipes_resolve(method):
    text = (ROOT / "configs" / "merge" / f"fusechat_{method}.yaml").read_text(encoding="utf-8")
    found = plan(text)
    assert {step.method for step in found.tensors} == {method}
    assert all(step.parameters == RELEASED[method] for step in found.tensors)
    assert len(found.models) == (3 if method == "varm" else 6) and found.template == "openchat/openchat_3.5"
    assert {step.dtype for step in found.tensors} == {"bfloat16"}


def test_every_recipe_is_tested():
    files = {path.name for path in (ROOT / "configs" / "merge").iterdir()}
    assert files == {f"fusechat_{method}.yaml" for method in RELEASED}
