"""pretrain: make the models of a run that are trained from scratch, or on from each other, before anything else.

A model is determined by its settings, its text and what it starts from; so runs that share its directory share it,
one making it while the others wait. A directory that this stage has not made is never touched. The text is held in
memory: this is for small models, and for real ones on little text.
"""

__all__ = ["check_pretraining", "pretrain_models"]

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fusejax.config import ModelRef, PretrainConfig, TokenizerConfig, place_of
from fusejax.data.chat import template_of
from fusejax.data.corpus import Document, cut_documents, dedupe
from fusejax.data.encoding import DocumentEncoder
from fusejax.data.tokenizer_training import train_tokenizer
from fusejax.errors import InputError
from fusejax.io.manifest import (
    MANIFEST,
    Manifest,
    atomic_directory,
    file_checksum,
    fingerprint_of,
    read_manifest,
    write_json,
    write_manifest,
)
from fusejax.io.models import model_fingerprint, open_model, resolve_model
from fusejax.io.tokenizer_probe import probe_tokenizer
from fusejax.io.tokenizers import Tokenizer, load_tokenizer
from fusejax.models import ModelConfig, model_config_to_hf
from fusejax.parallel import is_first
from fusejax.stages.context import Run, finished
from fusejax.stages.fit import Optimization, own_batch_rows, placement
from fusejax.stages.lock import exclusive
from fusejax.stages.outlook import how, shaped, tokenizer_directory
from fusejax.stages.prepare import EMBEDDED, Sample, described_sources, read_source, read_sources
from fusejax.stages.pretrain import pretrain
from fusejax.stages.resume import determining, finished_model
from fusejax.stages.together import meet
from fusejax.train.faults import FaultPolicy

_KIND, _OURS = "model", "pretrain"  # of a manifest: its kind, and the setting by which this stage knows its own
_WITHOUT_EFFECT = {"checkpoint_every", "text", "tokenizer", "start", "seed"}  # or told otherwise


def pretrain_models(run: Run) -> dict[str, Manifest]:
    """Trains the models that the configuration says how to make; finished ones are skipped, others go on."""
    return {place: _make(run, ref) for place, ref in _wanted(run).items()}


def check_pretraining(run: Run) -> None:
    """Refuses what would fail in the middle: no such text, tokenizer or architecture, a directory of somebody else's.

    Raises:
      InputError: names the model.
    """
    mesh = run.config.mesh.model_dump()
    for ref in _wanted(run).values():
        options, found = how(ref), run.outlook(ref)
        _check_ours(Path(ref.model).expanduser())
        longest = found.config.max_positions
        if options.seq_len > longest:
            raise InputError(f"{ref.name}: pretrain.seq_len is {options.seq_len}, the model has {longest} positions")
        own_batch_rows(placement(found.config, mesh), options.batch_size, f"{ref.name}: pretrain.batch_size")
        choice = ref.chat_template or run.config.corpus.chat_template
        if options.has_chat or run.config.corpus.has_chat:
            if found.tokenizer is not None:
                template_of(found.tokenizer, choice)
            elif choice is None:
                raise InputError(f"{ref.name}: a tokenizer that is trained has no chat template; give `chat_template`")
        if options.tokenizer is not None and found.tokenizer is not None and not Path(ref.model).exists():
            _check_tokenizer(ref, found.config, found.tokenizer.directory)
        check_sources(options.text)
    if _wanted(run):
        check_sources((*run.config.corpus.train, *run.config.corpus.valid, *run.config.corpus.test))


def _check_tokenizer(ref: ModelRef, config: ModelConfig, directory: Path) -> None:
    """Refuses a tokenizer whose ids transformers would not give: of some architectures it reads none but their own."""
    with tempfile.TemporaryDirectory() as name:
        trial = Path(name)
        load_tokenizer(directory).save(trial)
        write_json(trial / "config.json", model_config_to_hf(config))
        try:
            probe_tokenizer(load_tokenizer(trial))
        except InputError as error:
            raise InputError(
                f"{ref.name}: the tokenizer in {directory} does not go with the architecture {config.architecture}: "
                f"{error}"
            ) from error


def check_sources(sources: Any) -> None:
    """Refuses text that is not there."""
    for source in sources:
        if source.path != EMBEDDED:
            read_source(source)


def _wanted(run: Run) -> dict[str, ModelRef]:
    """The models to make, in order: all, or those that the fusions asked for need."""
    made = run.config.pretrained
    if run.only is None:
        return made
    needed = {place_of(ref.model) for ref in (run.config.target, *run.participants.values())}
    for place in reversed(made):
        start = how(made[place]).start
        if place in needed and start is not None:
            needed.add(place_of(start))
    return {place: ref for place, ref in made.items() if place in needed}


def _make(run: Run, ref: ModelRef) -> Manifest:
    directory = Path(ref.model).expanduser()
    with contextlib.ExitStack() as stack:
        if is_first():
            directory.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(exclusive(directory.parent, wait=True, name=f".{directory.name}.lock"))
        meet(f"locked {directory}")
        settings, parents = _identity(run, ref)
        if done := finished_model(directory, settings=settings, parents=parents):
            return done
        meet(f"seen {directory}")  # nobody looks at what is replaced next
        return _trained(run, ref, directory, settings, parents)


def _trained(run: Run, ref: ModelRef, directory: Path, settings: dict[str, Any], parents: dict[str, str]) -> Manifest:
    options = how(ref)
    _check_ours(directory)
    work = directory.with_name(f".{directory.name}.pretraining")
    documents = list(_documents(options))
    if not documents:
        raise InputError(f"{ref.name}: pretrain.text holds no documents; give files that are not empty")
    if options.start is not None:
        begun = open_model(resolve_model(options.start))
        tokenizer_dir, config, start = begun.directory, begun.config, begun.params
        tokenizer = load_tokenizer(tokenizer_dir)
    else:
        tokenizer_dir = tokenizer_directory(options) or _own_tokenizer(work / "tokenizer", options, documents)
        tokenizer = load_tokenizer(tokenizer_dir)
        config, start = shaped(options, tokenizer), None
    made = pretrain(
        directory,
        config,
        _encoder(run, ref, tokenizer).encode_batch(documents),
        label=f"pretrain {ref.name}",
        tokenizer_dir=tokenizer_dir,
        batch_size=options.batch_size,
        seq_len=options.seq_len,
        optimization=Optimization(
            options.learning_rate, warmup_ratio=options.warmup_ratio, weight_decay=options.weight_decay
        ),
        seed=settings[_OURS]["seed"],
        settings=settings,
        parents=parents,
        start=start,
        epochs=options.epochs,
        packing=options.packing,
        mesh=run.config.mesh.model_dump(),
        work=work / "training",
        faults=FaultPolicy(**run.config.faults.model_dump()),
        max_steps=options.max_steps,
        compute_dtype=options.compute_dtype,
        remat=options.remat,
        attention=run.config.memory.attention,
        checkpoint_every=options.checkpoint_every,
    )
    if is_first():
        shutil.rmtree(work / "tokenizer", ignore_errors=True)
        with contextlib.suppress(OSError):
            work.rmdir()  # stays where something was set aside
    return made


def _documents(options: PretrainConfig) -> Iterator[Document]:
    """The text as it is trained on: without duplicates, long documents cut, up to a number of bytes per domain."""
    pieces = list(cut_documents(dedupe(read_sources(options.text)), max_bytes=options.max_document_bytes))
    if options.max_bytes is None:
        return iter(pieces)
    sample = Sample(options.max_bytes)
    for piece in pieces:
        sample.add(piece)
    return (piece for piece, kept in zip(pieces, sample.kept(), strict=True) if kept)


def _own_tokenizer(directory: Path, options: PretrainConfig, documents: list[Document]) -> Path:
    """Trains the tokenizer in process 0, or finds the one that stands from before an interruption."""
    wanted = options.tokenizer
    if not isinstance(wanted, TokenizerConfig):
        raise ValueError("no tokenizer is to be trained")
    texts = [document.text for document in documents]
    settings = wanted.model_dump(mode="json") | {"texts": fingerprint_of(texts)}
    if is_first() and not finished(directory, kind="tokenizer", settings=settings, parents={}):
        with atomic_directory(directory) as temporary:
            train_tokenizer(texts, kind=wanted.kind, vocab_size=wanted.vocab_size, out_dir=temporary)
            write_manifest(temporary, kind="tokenizer", settings=settings)
    meet(f"trained {directory}")
    return directory


def _encoder(run: Run, ref: ModelRef, tokenizer: Tokenizer) -> DocumentEncoder:
    if not how(ref).has_chat:
        return DocumentEncoder(tokenizer)
    return DocumentEncoder(tokenizer, template_of(tokenizer, ref.chat_template or run.config.corpus.chat_template))


def _identity(run: Run, ref: ModelRef) -> tuple[dict[str, Any], dict[str, str]]:
    """Settings and parents: what determines the model."""
    options = how(ref)
    said = options.model_dump(mode="json", exclude=_WITHOUT_EFFECT)
    said["seed"] = run.config.seed if options.seed is None else options.seed
    settings = determining({_OURS: said, "text": described_sources(options.text)})
    if options.start is not None:
        start = resolve_model(options.start)
        settings |= _template_of(run, ref, run.tokenizer_in(start) if options.has_chat else None)
        return settings, {"start": model_fingerprint(start)}
    directory = tokenizer_directory(options)
    tokenizer = None if directory is None else run.tokenizer_in(directory)
    own = options.tokenizer.model_dump(mode="json") if isinstance(options.tokenizer, TokenizerConfig) else None
    settings["tokenizer"] = own if tokenizer is None else tokenizer.fingerprint
    return settings | _template_of(run, ref, tokenizer), {}


def _template_of(run: Run, ref: ModelRef, tokenizer: Tokenizer | None) -> dict[str, str]:
    """What identifies the chat template, where the text has conversations."""
    if not how(ref).has_chat:
        return {}
    choice = ref.chat_template or run.config.corpus.chat_template
    if tokenizer is not None:
        return {"chat_template": template_of(tokenizer, choice).fingerprint}
    path = Path(choice or "")
    return {"chat_template": file_checksum(path) if path.is_file() else str(choice)}


def _check_ours(directory: Path) -> None:
    """Refuses a directory that holds something which this stage has not made.

    Raises:
      InputError: names it.
    """
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    if directory.is_dir() and (directory / MANIFEST).is_file():
        manifest = read_manifest(directory)
        if manifest.kind == _KIND and _OURS in manifest.settings:
            return
    raise InputError(
        f"{directory} is there and was not made by `fusejax pretrain`, which leaves it alone; give `model` another "
        "directory, or leave `pretrain` out to use this one"
    )
