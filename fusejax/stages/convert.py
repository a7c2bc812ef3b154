"""export and import: between fusejax checkpoints and Hugging Face directories, bit for bit."""

__all__ = ["command", "export_model", "export_run"]

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fusejax.data.chat import ChatTemplate, template_of
from fusejax.data.chat_export import portable_template
from fusejax.errors import InputError
from fusejax.io.checksums import remembered_checksum
from fusejax.io.hf import load_hf_model, save_hf_model
from fusejax.io.manifest import atomic_directory, damaged_files, fingerprint_of, write_json, write_manifest
from fusejax.io.models import cache_dir, model_fingerprint, open_model, resolve_model
from fusejax.io.progress import say
from fusejax.io.stream_write import refuse_occupied
from fusejax.io.tokenizers import Tokenizer, check_vocabulary, load_tokenizer
from fusejax.stages.capture import chat_settings
from fusejax.stages.chat import prompt_of
from fusejax.stages.command import Result, parser
from fusejax.stages.context import Run, finished
from fusejax.stages.keep import keep_model


def command(name: str, words: list[str]) -> Result:
    """`fusejax export --model DIR --out DIR` and `fusejax import --model DIR --out DIR`."""
    kinds = {
        "export": "Write a fusejax checkpoint (or any model directory) as a Hugging Face directory and read it back.",
        "import": "Write a Hugging Face Llama or Mistral as a fusejax checkpoint (Orbax, checksums per leaf).",
    }
    if name == "export" and words and not words[0].startswith("-"):
        from fusejax.stages.run import command as run_command

        return run_command(name, words)
    arguments = parser(name, kinds[name])
    arguments.add_argument("--model", required=True, help="model directory or hub name (org/name)")
    arguments.add_argument("--out", type=Path, required=True, help="new directory")
    if name == "export":
        arguments.add_argument(
            "--chat-template", help="a named template or a jinja file, written for this tokenizer; default: its own"
        )
    given = arguments.parse_args(words)
    source = resolve_model(given.model)
    refuse_occupied(given.out)
    if name == "import":
        facts = _import(source, given.out)
    else:
        template = template_of(load_tokenizer(source), given.chat_template) if given.chat_template else None
        facts = export_model(source, given.out, template=template)
    return Result(facts, f"{name}ed {source} to {given.out}: {facts['parameters']:,} parameters")


def export_run(run: Run) -> dict[str, Any]:
    """Exports one model of the run (`export`, else the first merge, else the first fusion's) to `<output>/export`."""
    out = run.directory / "export"
    arm = run.config.exported
    source = run.model_dir(arm)
    if not source.is_dir():
        raise InputError(f"{source} does not exist: train (and merge) before export")
    target = run.config.target
    template = run.encoder(target).template
    settings: dict[str, Any] = {"arm": arm, "card": _card(run, arm)} | chat_settings(run, target)
    parents = {"model": model_fingerprint(source)}
    if finished(out, kind="export", settings=settings, parents=parents):
        bad = damaged_files(out, checksum=partial(remembered_checksum, memory=cache_dir() / "checksums"))
        if not bad:
            return {"export": str(out)}
        say(f"{out}: {', '.join(bad)} is damaged, making it again")
    with atomic_directory(out) as temporary:
        facts = export_model(source, temporary, card=settings["card"], template=template)
        write_manifest(temporary, kind="export", settings=settings, parents=parents)
    say(f"export: {arm} -> {out}")
    return facts | {"export": str(out)}


def export_model(
    source: Path, out: Path, *, card: str | None = None, template: ChatTemplate | None = None
) -> dict[str, Any]:
    """Writes a Hugging Face directory and compares every tensor with what is read back.

    Args:
      source: the model.
      out: an empty directory, or none yet.
      card: the text of README.md.
      template: how the model was trained to read conversations; None: as the files beside its tokenizer say.

    Raises:
      RuntimeError: the directory that was written does not hold the same bits.
    """
    import jax

    model, tokenizer = open_model(source), load_tokenizer(source)
    check_vocabulary(tokenizer, model.config.vocab_size, str(source))
    save_hf_model(out, model.config, model.params, tokenizer_dir=source, card=card)
    if template is not None:
        _write_chat(out, template, tokenizer)
    _, again = load_hf_model(out)
    same = jax.tree.map(lambda a, b: np.array_equal(np.asarray(a), np.asarray(b)), model.params, again)
    if not all(jax.tree.leaves(same)):
        raise RuntimeError(f"{out} does not hold the weights of {source}; the disk may be failing")
    return {"export": str(out), "parameters": _count(model.params)}


def _write_chat(out: Path, template: ChatTemplate, tokenizer: Tokenizer) -> None:
    """Writes the template where transformers looks for it, and the token that ends an answer as a stop token."""
    written = portable_template(template)
    (out / "chat_template.jinja").write_text(written, encoding="utf-8")
    _update_json(out / "tokenizer_config.json", {"chat_template": written})
    _, stop = prompt_of(template, tokenizer, [("user", "?")])
    ends = [stop] + [tokenizer.eos_id] * (tokenizer.eos_id not in (None, stop))
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends, "pad_token_id": tokenizer.pad_id}
    _update_json(out / "generation_config.json", {name: value for name, value in ids.items() if value is not None})


def _update_json(path: Path, values: dict[str, Any]) -> None:
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    write_json(path, known | values)


def _import(source: Path, out: Path) -> dict[str, Any]:
    model = open_model(source)
    check_vocabulary(load_tokenizer(source), model.config.vocab_size, str(source))
    settings = {"imported": model.fingerprint}
    keep_model(out, model.config, model.params, tokenizer_dir=source, settings=settings)
    return {"checkpoint": str(out), "parameters": _count(model.params), "fingerprint": fingerprint_of(settings)}


def _count(params: Any) -> int:
    import jax

    return sum(int(np.size(leaf)) for leaf in jax.tree.leaves(params))


def _card(run: Run, arm: str) -> str:
    config = run.config
    sources = "\n".join(f"- {source.name}: `{source.model}`" for source in config.sources)
    return (
        f"# {arm}\n\nMade by fusejax by knowledge fusion (FuseLLM).\n\n"
        f"- target before training: `{config.target.model}`\n{sources}\n\n"
        f"Loss: {config.loss.clm_weight} x CLM + {config.loss.fusion_weight} x {config.loss.divergence}, "
        f"alignment `{config.align.vocabulary}`, {config.capture.top_k} entries per position.\n"
    )
