"""The options of every stage of a run."""

__all__ = [
    "AlignConfig",
    "CaptureConfig",
    "EvaluateConfig",
    "FaultsConfig",
    "FusionConfig",
    "LogConfig",
    "LossConfig",
    "MemoryConfig",
    "MeshConfig",
    "TrainConfig",
]

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from fusejax.config.base import NAME, Config


class CaptureConfig(Config):
    """Running the sources over the corpus."""

    top_k: Annotated[int, Field(ge=1, le=1024)] | Literal["all"] = Field(
        default=10,
        description="Entries stored per position; all: the whole vocabulary, for comparisons at small ones.",
    )
    context: int = Field(default=2048, ge=2, description="Tokens per window; cut to the model's own limit.")
    batch_tokens: int = Field(default=16384, ge=1, description="Tokens per forward call.")
    codec: Literal["compact", "float16", "float32"] = Field(
        default="compact",
        description="How distributions are stored: 3 bytes per entry, or log-probabilities as float16 or float32.",
    )
    compute_dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="Dtype of activations.")
    shard_size: int | None = Field(
        default=None,
        ge=1,
        description="Documents per shard; a killed run loses at most one shard. None: as many as make about 8 MiB.",
    )

    @model_validator(mode="before")
    @classmethod
    def _accept_dtype(cls, values: Any) -> Any:
        if isinstance(values, dict) and "dtype" in values and "codec" not in values:
            values = {("codec" if key == "dtype" else key): value for key, value in values.items()}
        return values

    def entries(self, vocab_size: int) -> int:
        """Entries per position of a model with this vocabulary."""
        return vocab_size if self.top_k == "all" else min(self.top_k, vocab_size)

    @property
    def dtype(self) -> str:
        """The dtype of log-probabilities as a reader of the store sees them."""
        return "float16" if self.codec == "float16" else "float32"


class AlignConfig(Config):
    """Carrying distributions to the target's tokenizer."""

    positions: Literal["bytes", "dtw", "index", "chunks"] = Field(
        default="bytes",
        description="Pair positions by bytes, tokens by dynamic time warping as in the papers; for the rivals' losses "
        "by their number (uld), or chunks of text (alm).",
    )
    vocabulary: Literal["coarse", "exact", "min_ed", "statistics"] = Field(
        default="coarse",
        description="Common symbols, identical spellings, least edit distance (FuseLLM), or counts (FuseChat).",
    )
    conditioned: bool = Field(
        default=False, description="Also supervise positions inside a source token, conditioned on the bytes read."
    )
    chain: bool = Field(
        default=False, description="Also supervise long realised tokens by the source's probability of their bytes."
    )
    reference_bugs: bool = Field(
        default=False,
        description="With positions dtw: as the papers' programs were released, defects included. For comparison only.",
    )
    calibration_bytes: int = Field(
        default=2_000_000, ge=0, description="Text on which coarse symbols that disagree are joined; 0: none are."
    )

    @model_validator(mode="after")
    def _possible(self) -> "AlignConfig":
        if self.positions == "dtw" and self.vocabulary == "coarse":
            raise ValueError("positions dtw needs vocabulary exact, min_ed or statistics; coarse symbols need bytes")
        if self.positions == "bytes" and self.vocabulary == "statistics":
            raise ValueError("vocabulary statistics counts tokens that were aligned as strings: set positions dtw")
        if self.reference_bugs and self.positions != "dtw":
            raise ValueError("reference_bugs are those of the papers' alignment: set positions dtw")
        if self.positions != "bytes" and (self.chain or self.conditioned):
            raise ValueError("chain and conditioned need positions bytes")
        if self.positions in ("index", "chunks") and self.vocabulary != "exact":
            raise ValueError(f"positions {self.positions} compares no tokens: set vocabulary exact, for the report")
        return self


class FusionConfig(Config):
    """One fusion of sources, which trains one target."""

    name: str = Field(default="fused", description="Name of the trained target.", pattern=NAME)
    sources: tuple[str, ...] = Field(default=(), description="Names of the sources; empty: all of them.")
    method: Literal["min_ce", "avg_ce"] = Field(default="min_ce", description="FuseLLM's fusion function.")
    score: Literal["bits_per_byte", "token_ce"] = Field(
        default="bits_per_byte", description="How sources are compared: per byte, or per own token as in the papers."
    )
    window_bytes: int | None = Field(
        default=256, ge=1, description="Bytes over which sources are compared; None: document."
    )
    include_target: bool = Field(default=False, description="The target's own start distribution takes part (FuseLLM).")
    temperature: float = Field(default=1.0, gt=0, description="Of avg_ce's softmax over negative scores.")
    reward: Literal["score", "exp"] = Field(
        default="score", description="avg_ce weighs by softmax of -score, or of exp(-score) as in the papers."
    )


class LossConfig(Config):
    """clm_weight * CLM + fusion_weight * D(fused || target), in nats per trained token."""

    clm_weight: float = Field(
        default=0.5, ge=0, description="Weight of the causal language modelling loss; the papers': 0.9."
    )
    fusion_weight: float = Field(default=0.5, ge=0, description="Weight of the divergence; the papers': 0.1.")
    unsupervised: Literal["clm", "none"] = Field(
        default="clm",
        description="What takes the divergence's weight where there is no distribution; none: as in the papers.",
    )
    divergence: Literal["kl", "ce", "reverse_kl", "jsd", "uld", "alm"] = Field(
        default="kl", description="Divergence to the target; uld and alm are the rivals', at small vocabularies."
    )
    tail: Literal["bucket", "renormalize", "zero"] = Field(
        default="bucket", description="What the mass outside top-k does."
    )
    temperature: float = Field(default=1.0, gt=0, description="Temperature of the target's softmax in the divergence.")
    max_members: int = Field(
        default=256, ge=1, description="Gathered token ids per position; larger groups join the rest."
    )
    logits_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Of one chunk's logits; bfloat16 halves them for a less exact gradient."
    )
    z_loss_weight: float = Field(
        default=0.0, ge=0, description="Adds this times (log sum exp logits)^2 to the CLM loss; PaLM's: 1e-4."
    )

    @model_validator(mode="after")
    def _possible(self) -> "LossConfig":
        if self.divergence == "reverse_kl" and self.tail != "bucket":
            raise ValueError(f"divergence reverse_kl is infinite without a rest: it needs tail bucket, got {self.tail}")
        if self.divergence == "alm" and self.tail != "bucket":
            raise ValueError(f"divergence alm compares chunks and has no tail: leave tail at bucket, got {self.tail}")
        return self


class TrainConfig(Config):
    """Training the target."""

    baseline: bool = Field(default=True, description="Also train on CLM alone, from the same start on the same tokens.")
    epochs: int = Field(default=1, ge=1, description="Passes over the corpus.")
    max_steps: int | None = Field(default=None, ge=1, description="Stop after this many optimiser steps.")
    batch_size: int = Field(default=128, ge=1, description="Rows per optimiser step.")
    seq_len: int = Field(default=2048, ge=2, description="Tokens per row.")
    accumulation: int = Field(default=1, ge=1, description="Micro-batches per optimiser step.")
    packing: bool = Field(default=True, description="Several documents per row, without attention across them.")
    learning_rate: float = Field(default=1e-5, gt=0, description="Peak learning rate.")
    schedule: Literal["cosine", "linear", "constant"] = Field(default="cosine", description="After the warm-up.")
    warmup_ratio: float = Field(default=0.008, ge=0, le=1, description="Share of the steps spent warming up.")
    adam_b1: float = Field(default=0.9, ge=0, lt=1, description="AdamW beta 1.")
    adam_b2: float = Field(default=0.95, ge=0, lt=1, description="AdamW beta 2.")
    weight_decay: float = Field(default=0.1, ge=0, description="AdamW decay of matrices; norms and biases have none.")
    clip_norm: float = Field(default=1.0, gt=0, description="Global norm to which gradients are clipped.")
    compute_dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="Dtype of activations.")
    remat: Literal["none", "dots", "full"] = Field(
        default="none", description="What is recomputed in the backward pass."
    )
    checkpoint_every: int = Field(default=500, ge=1, description="Steps between checkpoints.")
    log_every: int = Field(default=10, ge=1, description="Steps between lines of metrics.jsonl.")
    evaluate_every: int | None = Field(
        default=None, ge=1, description="Steps between bits per byte of the valid split; None: never."
    )
    tensorboard: bool = Field(default=False, description="Also write TensorBoard events.")


MOMENT_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


class MemoryConfig(Config):
    """What training holds in memory; it always computes the update in float32."""

    moments_dtype: Literal["float32", "bfloat16", "int8"] = Field(
        default="float32", description="Of AdamW's two moments; bfloat16 and int8 (codes) are rounded stochastically."
    )
    param_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Dtype of the weights; bfloat16 has a float32 copy in the optimiser's state."
    )
    attention: Literal["auto", "xla", "cudnn"] = Field(
        default="auto",
        description="auto: the kernel of TPUs and, in 16 bits, of NVIDIA GPUs; xla: none; cudnn: GPUs' or an error.",
    )
    sequence_parallel: bool = Field(
        default=False, description="Activations between projections lie over mesh.tensor along positions."
    )

    @property
    def state_bytes(self) -> int:
        """Bytes per parameter of a train state: the parameter, its float32 copy if any, and both moments.

        Moments in 8 bits have two bytes more for each row of a leaf, which are not in this.
        """
        return (4 if self.param_dtype == "float32" else 6) + 2 * MOMENT_BYTES[self.moments_dtype]


class FaultsConfig(Config):
    """What training does when something goes wrong; the watchdog is of the other long stages, too."""

    watchdog_seconds: float | None = Field(
        default=1200.0,
        gt=0,
        description="A step that takes longer ends the process with its stacks and exit code 75. Compiling, saving, "
        "evaluating and a batch of another stage may take three times that. None: no watchdog.",
    )
    max_skipped_steps: int = Field(
        default=0, ge=0, description="Steps in a row that are left out because loss or gradient is not finite."
    )
    spike_factor: float | None = Field(
        default=None, gt=1, description="Also leave out a step whose loss is above this times the recent median."
    )
    on_damaged_checkpoint: Literal["stop", "previous"] = Field(
        default="stop", description="Whether a damaged checkpoint stops the run, or the one before it is taken."
    )
    on_changed_settings: Literal["stop", "restart"] = Field(
        default="stop",
        description="Whether checkpoints of other settings stop the run, or are set aside and training starts afresh.",
    )


class LogConfig(Config):
    """Where the metrics of a training go beside metrics.jsonl; TensorBoard is `train.tensorboard`."""

    wandb_project: str | None = Field(
        default=None, description="Weights & Biases project; its key is read from the environment by wandb alone."
    )


class MeshConfig(Config):
    """Devices per mesh axis; the product must divide the number of devices."""

    data: int = Field(default=1, ge=1, description="Replicas that see different rows.")
    fsdp: int = Field(default=1, ge=1, description="Shards of parameters and rows.")
    tensor: int = Field(default=1, ge=1, description="Shards of heads, mlp and vocabulary.")


class EvaluateConfig(Config):
    """Bits per byte on the test split."""

    context: int = Field(default=2048, ge=2, description="Tokens per window; cut to the model's own limit.")
    batch_tokens: int = Field(default=16384, ge=1, description="Tokens per forward call.")
    ensembles: tuple[Literal["mean", "weighted", "top1"], ...] = Field(
        default=("mean",),
        description="Of the sources and the target: mean probability; weighted by bits per byte of the valid split; or "
        "one model per document, by bits per byte of its prompt. `ensemble: true` or `false`: mean or none.",
    )
    tasks: tuple[str, ...] = Field(
        default=(), description="Local files of questions that every model answers (forms: docs, Evaluate); none."
    )
    task_fewshot: int = Field(default=0, ge=0, description="Examples of the file itself that each prompt shows.")
    task_limit: int | None = Field(default=None, ge=1, description="Examples per task file that are tested. None: all.")

    @model_validator(mode="before")
    @classmethod
    def _one_switch(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "ensemble" not in values:
            return values
        values = dict(values)
        wanted = values.pop("ensemble")
        if not isinstance(wanted, bool) or "ensembles" in values:
            raise ValueError("ensemble must be true or false, beside no `ensembles`: list what you want there")
        return values | {"ensembles": ("mean",) if wanted else ()}

    @field_validator("ensembles")
    @classmethod
    def _once_each(cls, ensembles: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(ensembles)) < len(ensembles):
            raise ValueError("each ensemble may be named once")
        return ensembles
