"""The one configuration tree of a run: plain frozen dataclasses with Megatron's own names.

A recipe (YAML) fills it, a flag overrides it (`--tensor-model-parallel-size 2` sets
`parallel.tensor_model_parallel_size`), `validate.py` judges it before any process group exists, and a copy goes
into every checkpoint. A docstring under a field is its line in `--help`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator
from tyro.constructors import PrimitiveConstructorSpec


@dataclass
class FamilyDefaults:
    """What a `RunConfig` asks of the families.

    Attributes:
        name: of the family of a run that names none.
        settings: the default settings of a family, given its name.
    """

    name: str
    settings: Callable[[str], Any]


# Set by `presets.py`: this file cannot ask the registry of families itself, which imports the types that stand here.
family_defaults = FamilyDefaults("", str)

# Unknown keys in a recipe are errors, never silently dropped (read by pydantic in recipe.py).
_STRICT = {"extra": "forbid"}


def _words(value: Any) -> Any:
    """A recipe may leave the brackets of a single word out, and write a weight as a number."""
    if value is None:
        return []
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list | tuple):
        return words
    return [str(word) if isinstance(word, int | float) else word for word in words]


Words = Annotated[tuple[str, ...], BeforeValidator(_words)]

# A flag that alone means yes, and that may be left to the machine.
_ANSWERS = {"true": True, "false": False}
OptionalFlag = Annotated[
    bool | None,
    PrimitiveConstructorSpec(
        nargs=(0, 1),
        metavar="[true|false]",
        instance_from_str=lambda words: _ANSWERS[words[0].lower()] if words else True,
        is_instance=lambda value: value is None or isinstance(value, bool),
        str_from_instance=lambda value: [str(value).lower()],
        choices=tuple(_ANSWERS),
    ),
]


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the decoder (Llama, Qwen2). Presets fill these."""

    __pydantic_config__ = _STRICT

    num_layers: int = 8
    """Decoder layers."""
    hidden_size: int = 64
    """Decoder width D."""
    ffn_hidden_size: int = 160
    """Inner width of the gated MLP (SwiGLU)."""
    num_attention_heads: int = 4
    """Query heads; the head dimension is hidden_size / num_attention_heads."""
    num_query_groups: int | None = None
    """Key/value heads (grouped-query attention); None means one for each query head."""
    add_qkv_bias: bool = False
    """Biases of the query, key and value matrices, as Qwen2 has them."""
    vocab_size: int = 384
    """Rows of the embedding, before padding for tensor parallelism: the tokenizer's pieces, or up to 64 more."""
    max_position_embeddings: int = 2048
    """Longest sample the decoder was made for, in tokens."""
    norm_epsilon: float = 1e-5
    """Epsilon of every RMSNorm of the decoder."""
    rotary_base: int = 10000
    """Base (theta) of the rotary position embedding."""


@dataclass(frozen=True)
class ParallelConfig:
    """How the model and the data are spread over ranks."""

    __pydantic_config__ = _STRICT

    tensor_model_parallel_size: int = 1
    """Ranks that share each layer's matrices."""
    sequence_parallel: bool = False
    """Split the activations between the matrices over the tensor-parallel ranks too."""
    pipeline_model_parallel_size: int = 1
    """Pipeline stages."""
    num_layers_per_virtual_pipeline_stage: int | None = None
    """Layers of one chunk of the interleaved schedule; None runs the plain 1F1B schedule."""
    decoder_first_pipeline_num_layers: int | None = None
    """Decoder layers of the first pipeline stage, which embeds too; stages without a number share the rest equally."""
    decoder_last_pipeline_num_layers: int | None = None
    """Decoder layers of the last pipeline stage, which has the output layer and, with some
    families, more."""
    context_parallel_size: int = 1
    """Ranks that share the tokens of one pack; each sample is cut zig-zag, so that all do equal work."""
    variable_seq_lengths: OptionalFlag = None
    """Leave packs as long as they are; pipeline stages then tell each other shapes, which makes a GPU wait. false pads
    the packs of a step to one length, and what stages send to fixed shapes. Without it: false on GPUs, true on CPUs."""
    tp_comm_overlap: bool = False
    """Overlap what tensor-parallel ranks tell each other with their matrix products (TransformerEngine's userbuffers;
    with --sequence-parallel, ranks of one node). Pads every pack to --seq-length, since its buffers have one size."""
    use_distributed_optimizer: bool = True
    """Shard the optimizer state over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass still runs."""
    overlap_param_gather: bool = False
    """Gather updated parameters while the next forward pass runs (needs --overlap-grad-reduce)."""
    distributed_timeout_minutes: int = 10
    """A collective that waits longer than this fails instead of hanging."""


@dataclass(frozen=True)
class TrainingConfig:
    """What trains, on how many samples, in which precision."""

    __pydantic_config__ = _STRICT

    stage: int = 2
    """What trains, by a number of the model family's."""
    global_batch_size: int = 16
    """Samples of one optimizer step, over all ranks."""
    train_iters: int | None = None
    """Optimizer steps of the run (give this or --train-samples)."""
    train_samples: int | None = None
    """Samples of the run; only its last step may be short."""
    exit_interval: int | None = None
    """Save and exit when the iteration is a multiple of this, leaving the schedule as it is."""
    eval_interval: int | None = None
    """Every so many iterations, and at the end, measure the losses on the held-out samples of each dataset (see --split
    and --valid-data-path)."""
    eval_iters: int | None = None
    """Most batches of each dataset that an evaluation takes, always the same ones; None takes all held-out samples."""
    seed: int = 1234
    """Seeds the initial weights and the order of the samples."""
    bf16: bool = False
    """Compute in bfloat16, with float32 master weights and gradient reduction."""
    fp8_format: Literal["hybrid", "e4m3"] | None = None
    """Multiply the decoder's matrices in FP8: "hybrid" is E4M3 forward and E5M2 for gradients. Wants TransformerEngine,
    --bf16 and a GPU that has FP8 (Ada, Hopper or newer)."""
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise"] = "delayed"
    """With --fp8-format, where scales come from: the last 1024 microbatches (delayed), each tensor as it is
    (tensorwise), or each block of 128 values (blockwise; Hopper or newer, CUDA 12.9)."""
    cross_entropy_loss_fusion: bool = False
    """Fuse the language loss, so that no float32 copy of the logits is kept (with --bf16)."""
    cross_entropy_fusion_impl: Literal["native", "te"] = "native"
    """With --cross-entropy-loss-fusion, whose: megatron-core's, compiled by torch, or TransformerEngine's kernel, which
    works in place."""
    gradient_accumulation_fusion: bool = True
    """Where it can be, add weight gradients to the float32 buffer in the matrix product itself: TransformerEngine's
    layers do it themselves, megatron-core's own (the output layer) where NVIDIA's apex is installed."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Layer specification: torch ("local") or TransformerEngine; "auto" takes the latter with --bf16 where it runs and
    has a fast attention over packs: cuDNN's on Hopper or newer, or flash-attn."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Recompute whole layers or only the core attention in the backward pass, to save memory."""
    recompute_method: Literal["uniform", "block"] | None = None
    """With full recompute: every layer group ("uniform") or the first ones ("block")."""
    recompute_num_layers: int | None = None
    """With full recompute: layers of a group (uniform), or layers recomputed on each stage (block)."""
    recompute_modules: Words = ()
    """With selective recompute: which parts of each layer, core_attn or mlp or both; none named is core_attn, which
    TransformerEngine's attention recomputes anyway."""
    deterministic_mode: bool = False
    """Only kernels that give the same bits each time, on GPUs too: slower. CPUs always do."""
    loss_normalization: Literal["global", "microbatch"] = "global"
    """Divide the loss by the labels of the whole step, or take the published mean over microbatch means."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule. The defaults are the published ones: no weight decay, no gradient clipping."""

    __pydantic_config__ = _STRICT

    lr: float = 4e-5
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after the warm-up."""
    lr_warmup_fraction: float = 0.01
    """Part of the steps over which the rate rises from zero."""
    lr_overrides: dict[str, float] = field(default_factory=dict)
    """Peak rates of parameters whose name matches a glob, such as {"vision_model.*": 4e-4}; 0 is a rate too."""
    weight_decay: float = 0.0
    """Decoupled weight decay; never applied to biases and norms."""
    adam_beta1: float = 0.9
    """Decay of the gradient's running mean."""
    adam_beta2: float = 0.999
    """Decay of the squared gradient's running mean."""
    adam_eps: float = 1e-8
    """Added to the root of the second moment."""
    clip_grad: float = 0.0
    """Global gradient norm to clip to; 0 does not clip, as the published runs."""


@dataclass(frozen=True)
class DataConfig:
    """Where the samples come from and how they are packed."""

    __pydantic_config__ = _STRICT

    data_path: Words = ()
    """Prefixes of datasets made by tools/preprocess_data.py (its --output-prefix). Several are read as one, or, with a
    weight before each (0.3 a 0.7 b), in these shares."""
    valid_data_path: Words = ()
    """Prefixes of held-out datasets for --eval-interval, none of whose samples is trained on."""
    split: str = "100,0"
    """Shares of each dataset of --data-path that are trained on and held out, drawn at random and alike in every run:
    99,1 holds out one sample in a hundred."""
    data_cache_path: str | None = None
    """Folder for what takes a while to compute from a dataset; may be shared by runs. Nothing is written elsewhere."""
    tokenizer_model: str | None = None
    """The sentencepiece tokenizer.model; when given it must be the one the dataset was made with."""
    mock_data: bool = False
    """Train on synthetic samples instead of --data-path."""
    seq_length: int = 2048
    """Most tokens of one pack; longer samples are left out of the run, which says so at its start."""
    max_images_per_pack: int | None = None
    """Most images of one pack, which bounds what their activations take; None does not bound it. Samples with more are
    left out of the run, which says so at its start."""
    shuffle: bool = True
    """Visit each epoch's samples in a random order that the seed fixes; off keeps the dataset's order (what --split
    leaves of one has a fixed random order)."""
    group_by_modality: bool = False
    """Draw batches that hold samples with images or text alone, not both."""
    image_decoder: Literal["auto", "dali", "threads", "pillow"] = "auto"
    """Who decodes images: DALI (on the GPU where there is one), threads with fast CPU libraries, or the plain
    reference, bit-equal to the published preprocessing. "auto" is DALI on GPUs, threads elsewhere."""
    num_workers: int = 2
    """Threads that decode images on each rank that needs pixels."""
    mmap_bin_files: bool = True
    """Map the .bin files into memory; off uses plain reads."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Where runs are saved and started from."""

    __pydantic_config__ = _STRICT

    save: str | None = None
    """Folder for checkpoints (iter_0000100/, latest_checkpointed_iteration.txt) and losses.jsonl."""
    load: str | None = None
    """Folder to resume from; a folder without a checkpoint starts from the beginning. It may be one checkpoint of it
    (iter_0000100)."""
    ckpt_step: int | None = None
    """Take this iteration of --load, not the latest; without --load, of --pretrained-checkpoint. Every start with it
    begins there, so leave it out of a job that is requeued."""
    save_interval: int | None = None
    """Save every so many iterations, beside the save at the end."""
    async_save: bool = False
    """Write checkpoints in the background, by forked processes, while training goes on."""
    keep_last: int | None = None
    """Keep only so many of the newest checkpoints; None keeps all."""
    save_retain_interval: int | None = None
    """With --keep-last: of the older ones, keep those at multiples of this, too."""
    retain_weights_only: bool = False
    """Take the optimizer state out of what --save-retain-interval keeps (about six sevenths of its bytes)."""
    pretrained_checkpoint: str | None = None
    """Start from the weights alone: a run's folder, one checkpoint of it (iter_0000100), or a folder in the published
    Hugging Face layout."""


@dataclass(frozen=True)
class FaultConfig:
    """What is done about a step whose loss or gradient norm cannot be right, and what is found out about it."""

    __pydantic_config__ = _STRICT

    bad_step_policy: Literal["stop", "skip"] = "stop"
    """A step with a loss or gradient norm that is not finite, or a spike: "stop" saves what was before it and ends the
    run, "skip" goes on without its update. Its samples are listed in SAVE/bad_steps.jsonl."""
    spike_factor: float | None = None
    """A loss or gradient norm above so many times the median of the last 100 steps is a spike; None knows none."""
    rerun_mode: Literal["disabled", "validate_results"] = "disabled"
    """Run a bad step again, to tell a fault of the hardware from a bad batch (megatron-core's rerun state machine);
    checks each rank's gradients before they are reduced, too."""


@dataclass(frozen=True)
class LoggingConfig:
    """What is reported."""

    __pydantic_config__ = _STRICT

    log_interval: int = 1
    """Iterations between two log lines."""
    tensorboard_dir: str | None = None
    """Folder for TensorBoard event files."""
    log_straggler: bool = False
    """With each log line, say which ranks took longest over their forward passes and their data."""


@dataclass(frozen=True)
class RunConfig:
    """The whole tree.

    `vision` has the settings of the model family, an instance of its `Config`; None takes the defaults of that.
    """

    __pydantic_config__ = _STRICT

    family: str = field(default_factory=lambda: family_defaults.name)
    """The model family: a name, or a module that has one (package.module). --preset implies that of its model."""
    model: ModelConfig = field(default_factory=ModelConfig)
    vision: Any = None
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    faults: FaultConfig = field(default_factory=FaultConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        if self.vision is None:
            object.__setattr__(self, "vision", family_defaults.settings(self.family))

    def to_dict(self) -> dict[str, Any]:
        """The tree as nested plain dictionaries, ready for YAML or JSON."""
        return asdict(self)

    @property
    def total_samples(self) -> int:
        """Samples of the whole run: --train-samples, or --train-iters full batches."""
        if self.training.train_samples is not None:
            return self.training.train_samples
        return (self.training.train_iters or 0) * self.training.global_batch_size

    @property
    def total_iterations(self) -> int:
        """Optimizer steps of the whole run, a short last step included."""
        return -(-self.total_samples // self.training.global_batch_size)

    @property
    def virtual_pipeline_model_parallel_size(self) -> int | None:
        """Model chunks of a rank under the interleaved schedule, None without it."""
        layers = self.parallel.num_layers_per_virtual_pipeline_stage
        if layers is None:
            return None
        return self.model.num_layers // self.parallel.pipeline_model_parallel_size // layers

    @property
    def row_multiple(self) -> int:
        """What the rows of a pack on each rank must be a multiple of, for its matrix products in FP8."""
        if self.training.fp8_format is None:
            return 1
        # TransformerEngine's assert_dim_for_fp8_exec, and a block's side: a sequence-parallel rank quantises its rows
        # before they are gathered, so that they must be whole blocks (assert_dim_for_all_gather).
        return 128 if self.training.fp8_recipe == "blockwise" else 16

    @property
    def stage_layers(self) -> tuple[int, ...]:
        """Decoder layers of each pipeline stage; they add up to fewer than the model's where no split is even."""
        ends = (
            self.parallel.decoder_first_pipeline_num_layers,
            self.parallel.decoder_last_pipeline_num_layers,
        )
        stages = self.parallel.pipeline_model_parallel_size
        named = [layers for layers in ends if layers is not None]
        each = (self.model.num_layers - sum(named)) // max(stages - len(named), 1)
        first, last = (each if layers is None else layers for layers in ends)
        return (first,) if stages == 1 else (first, *[each] * (stages - 2), last)
