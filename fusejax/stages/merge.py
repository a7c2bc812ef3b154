"""merge: several targets become one, in parameter space (artefact A7)."""

__all__ = ["command", "merge_models", "merge_run"]

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fusejax.errors import InputError, nearest
from fusejax.io.hf import save_hf_model
from fusejax.io.manifest import Manifest, fingerprint_of, write_json
from fusejax.io.models import LoadedModel, open_model, resolve_model
from fusejax.merging import MERGE_METHODS, merge_trees
from fusejax.stages.command import Result, parser
from fusejax.stages.context import Run, finished
from fusejax.stages.keep import keep_model

_RECIPE_KEYS = ("method", "base", "targets", "parameters")


def merge_run(run: Run) -> Manifest | None:
    """Merges the trained targets of a run; nothing where the configuration has no `merge`."""
    options = run.config.merge
    if options is None:
        return None
    arms = list(options.targets) or [fusion.name for fusion in run.config.fusions]
    base_path = run.model_path(run.config.target)
    settings = {"method": options.method, "parameters": options.parameters, "targets": arms}
    targets = [open_model(run.model_dir(arm)) for arm in arms]
    parents = {arm: target.fingerprint for arm, target in zip(arms, targets, strict=True)}
    parents["base"] = run.fingerprint(run.config.target)
    directory = run.model_dir("merged")
    if done := finished(directory, kind="model", settings=settings, parents=parents):
        return done
    run.replace_stale(directory)
    base = open_model(base_path)
    merged, coefficients = merge_models(base, targets, method=options.method, parameters=options.parameters)
    facts = {"coefficients": coefficients}
    return keep_model(
        directory, base.config, merged, tokenizer_dir=base_path, settings=settings, parents=parents, facts=facts
    )


def merge_models(
    base: LoadedModel, targets: Sequence[LoadedModel], *, method: str, parameters: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Merges loaded models of one architecture.

    Returns:
      The merged parameters, and the coefficient of every target per matrix where the method has them.

    Raises:
      InputError: different architectures, an unknown method or parameter, a NaN.
    """
    if method not in MERGE_METHODS:
        raise InputError(f"unknown merge method {method!r}.{nearest(method, MERGE_METHODS)} Known: {_methods()}")
    for target in targets:
        ours = (target.config.vocab_size, target.config.hidden_size, target.config.num_layers)
        theirs = (base.config.vocab_size, base.config.hidden_size, base.config.num_layers)
        if ours != theirs:
            raise InputError(
                f"{target.directory} has (vocabulary, width, layers) {ours}, the base {base.directory} has {theirs}; "
                "models that are merged must be of one structure"
            )
    fingerprints = [target.fingerprint for target in targets]
    if len(set(fingerprints)) < len(fingerprints):
        raise InputError("the same model is given twice as a target; give each once, with a weight")
    trees = [target.params for target in targets]
    if MERGE_METHODS[method].coefficients is None:
        return merge_trees(base.params, trees, method=method, **parameters), {}
    merged, factors = merge_trees(base.params, trees, method=method, coefficients=True, **parameters)
    return merged, {path: factor.tolist() for path, factor in factors.items()}


def command(name: str, words: list[str]) -> Result:
    """`fusejax merge --method M --base DIR --targets DIR DIR --out DIR`, `--recipe FILE`, or `merge CONFIG`."""
    if words and not words[0].startswith("-"):
        from fusejax.stages.run import command as run_command

        return run_command(name, words)
    arguments = parser(name, f"Merge models in parameter space. Methods: {_methods()}.")
    arguments.add_argument("--method", help="merge method")
    arguments.add_argument("--base", help="model the targets were trained from: directory or hub name")
    arguments.add_argument("--targets", nargs="+", default=[], help="models to merge: directories or hub names")
    arguments.add_argument("--recipe", type=Path, help="YAML with method, base, targets, parameters")
    arguments.add_argument("--out", type=Path, required=True, help="new Hugging Face directory")
    given, extra = arguments.parse_known_args(words)
    recipe = _recipe(given.recipe) if given.recipe else {}
    method = given.method or recipe.get("method")
    base_ref, target_refs = given.base or recipe.get("base"), given.targets or recipe.get("targets", [])
    if not method or not base_ref or not target_refs:
        raise InputError("merge needs --method, --base and --targets, or a --recipe that has them")
    parameters = recipe.get("parameters", {}) | _parameters(extra)
    if given.out.exists() and (not given.out.is_dir() or any(given.out.iterdir())):
        raise InputError(f"{given.out} exists and is not an empty directory; choose another --out or remove it")
    base = open_model(resolve_model(base_ref))
    targets = [open_model(resolve_model(ref)) for ref in target_refs]
    merged, coefficients = merge_models(base, targets, method=method, parameters=parameters)
    facts = {
        "method": method,
        "parameters": parameters,
        "base": {base_ref: base.fingerprint},
        "targets": {ref: target.fingerprint for ref, target in zip(target_refs, targets, strict=True)},
    }
    card = f"# Merged model\n\n```yaml\n{yaml.safe_dump(facts, sort_keys=False)}```\n"
    save_hf_model(given.out, base.config, merged, tokenizer_dir=base.directory, card=card)
    if coefficients:
        write_json(given.out / "coefficients.json", coefficients)
    data = facts | {"out": str(given.out), "fingerprint": fingerprint_of(facts)}
    return Result(data, f"{method} of {len(targets)} targets -> {given.out}")


def _methods() -> str:
    return ", ".join(sorted(MERGE_METHODS))


def _recipe(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"no recipe at {path}")
    read = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(read, dict):
        raise InputError(f"{path} holds no mapping; expected the keys {', '.join(_RECIPE_KEYS)}")
    for key in read:
        if key not in _RECIPE_KEYS:
            known = ", ".join(_RECIPE_KEYS)
            raise InputError(f"{path}: unknown key {key!r}.{nearest(key, _RECIPE_KEYS)} Known: {known}")
    return read


def _parameters(words: list[str]) -> dict[str, Any]:
    """`--select-topk 0.5 --weights 1 2` -> {"select_topk": 0.5, "weights": [1, 2]}."""
    found: dict[str, list[Any]] = {}
    current: str | None = None
    for word in words:
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            current = name.replace("-", "_")
            found[current] = [yaml.safe_load(value)] if value else []
        elif current is None:
            raise InputError(f"do not know what {word!r} belongs to; parameters are given as --name value")
        else:
            found[current].append(yaml.safe_load(word))
    if empty := [name for name, values in found.items() if not values]:
        raise InputError(f"the parameters {empty} have no value")
    return {name: values[0] if len(values) == 1 else values for name, values in found.items()}
