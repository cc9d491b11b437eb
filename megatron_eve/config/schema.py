"""The one configuration tree of a run: plain frozen dataclasses with Megatron's own names.

A recipe (YAML) fills it, a flag overrides it (`--tensor-model-parallel-size 2` sets
`parallel.tensor_model_parallel_size`), `validate.py` judges it before any process group exists, and a copy goes
into every checkpoint. A docstring under a field is its text in `--help`, and `Flag` the rest (`flags.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from megatron_eve.config.flag_types import Flag, Words
from megatron_eve.config.lora import LoRAConfig
from megatron_eve.config.pipeline_layout import parse_layout


@dataclass
class FamilyDefaults:
    """The families' part of a `RunConfig`: its default family and their default settings.

    Attributes:
        name: of the default family.
        settings: the default settings of a family, given its name.
    """

    name: str
    settings: Callable[[str], Any]


# Set by `presets.py`: this file cannot import the registry of families, which imports the types of this file.
family_defaults = FamilyDefaults("", str)

# Unknown keys in a recipe are errors, never silently dropped (read by pydantic in recipe.py).
_STRICT = {"extra": "forbid"}


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the decoder, a Llama or Qwen2, which --preset sets together."""

    __pydantic_config__ = _STRICT

    num_layers: int = 8
    """Decoder layers."""
    hidden_size: int = 64
    """Width of the decoder (hidden size)."""
    ffn_hidden_size: int = 160
    """Inner width of the gated MLP (SwiGLU)."""
    num_attention_heads: int = 4
    """Attention (query) heads of each layer; a head has --hidden-size / --num-attention-heads values."""
    num_query_groups: Annotated[int | None, Flag(unset="one for each attention head")] = None
    """Key/value heads of each layer (grouped-query attention)."""
    add_qkv_bias: bool = False
    """Add biases to the query, key and value projections, as in Qwen2."""
    vocab_size: int = 384
    """Rows of the token embedding, before padding for tensor parallelism: the pieces of the tokenizer, or up to 64
    more."""
    modality_experts: bool = False
    """Give each decoder layer a second set of norms and matrices, for the rows of images (arXiv 2502.06788)."""
    max_position_embeddings: int = 2048
    """Longest sample, in tokens."""
    norm_epsilon: float = 1e-5
    """Epsilon of the RMSNorm layers."""
    rotary_base: int = 10000
    """Base (theta) of the rotary position embedding."""
    rotary_seq_len_interpolation_factor: Annotated[float | None, Flag(unset="positions are not scaled")] = (
        None
    )
    """Divide positions by this before the rotary embedding (linear scaling), for samples that are so many times longer
    than those that the model was pretrained on."""
    use_rope_scaling: bool = False
    """Scale the rotary embedding as Llama 3.1 does (rope_type llama3 of transformers)."""
    rope_scaling_factor: float = 8.0
    """Factor of --use-rope-scaling: 8 in Llama 3.1, 32 in Llama 3.2."""


@dataclass(frozen=True)
class ParallelConfig:
    """How the model and the data are split over ranks."""

    __pydantic_config__ = _STRICT

    tensor_model_parallel_size: int = 1
    """Tensor-parallel ranks, over which the matrices of each layer are split."""
    sequence_parallel: bool = False
    """Split the activations between the matrices over the tensor-parallel ranks, too (sequence parallelism)."""
    pipeline_model_parallel_size: int = 1
    """Pipeline stages, over which the layers are split."""
    num_layers_per_virtual_pipeline_stage: Annotated[int | None, Flag(unset="the 1F1B schedule")] = None
    """Decoder layers of one model chunk of the interleaved pipeline schedule."""
    pipeline_model_parallel_layout: Annotated[str | None, Flag("LAYOUT", "an equal split")] = None
    """Decoder layers of each pipeline stage in Megatron's notation, such as 'Et*3|t*5|t*5|t*3,L': E is the embedding, t
    a decoder layer, L the loss, and | stands between stages; twice as many stages as --pipeline-model-parallel-size are
    two model chunks each, for the interleaved schedule."""
    decoder_first_pipeline_num_layers: Annotated[int | None, Flag(unset="an equal share")] = None
    """Decoder layers of the first pipeline stage, which also has the embedding; short for
    --pipeline-model-parallel-layout."""
    decoder_last_pipeline_num_layers: Annotated[int | None, Flag(unset="an equal share")] = None
    """Decoder layers of the last pipeline stage, which also has the output layer and, in some model families, more;
    short for --pipeline-model-parallel-layout."""
    context_parallel_size: int = 1
    """Context-parallel ranks, over which the tokens of each pack are split; each sample is cut in a zigzag, so that the
    ranks have equal work."""
    variable_seq_lengths: Annotated[bool | None, Flag(unset="false on GPUs, true on CPUs")] = None
    """Let packs differ in length, for which pipeline stages exchange shapes, and a GPU waits; with false, the packs of
    a step are padded to one length."""
    tp_comm_overlap: bool = False
    """Overlap tensor-parallel communication with matrix products (TransformerEngine's userbuffers); needs
    --sequence-parallel and ranks of one node, and pads each pack to --seq-length."""
    use_distributed_optimizer: bool = True
    """Shard the optimizer state over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass still runs."""
    overlap_param_gather: bool = False
    """Gather updated parameters while the next forward pass runs; needs --overlap-grad-reduce."""
    distributed_timeout_minutes: Annotated[int, Flag("MINUTES")] = 10
    """Time after which a collective operation that still waits fails, in minutes."""

    def chunk_layers(self, layers: int) -> tuple[int, ...]:
        """Decoder layers of each model chunk, in the order of the model: chunk i is on stage i modulo their number.

        They add up to fewer than `layers`, the model's, where no split is even.

        Raises:
            ValueError: --pipeline-model-parallel-layout cannot be read (`pipeline.py` reports it).
        """
        if self.pipeline_model_parallel_layout is not None:
            return parse_layout(self.pipeline_model_parallel_layout)
        stages, chunk = self.pipeline_model_parallel_size, self.num_layers_per_virtual_pipeline_stage
        if chunk is not None:
            return (chunk,) * (layers // stages // chunk * stages)
        ends = (self.decoder_first_pipeline_num_layers, self.decoder_last_pipeline_num_layers)
        named = [count for count in ends if count is not None]
        each = (layers - sum(named)) // max(stages - len(named), 1)
        first, last = (each if count is None else count for count in ends)
        return (first,) if stages == 1 else (first, *[each] * (stages - 2), last)


@dataclass(frozen=True)
class TrainingConfig:
    """What is trained, on how many samples, and in which precision."""

    __pydantic_config__ = _STRICT

    stage: int = 2
    """Training stage, a number of the model family's."""
    global_batch_size: int = 16
    """Samples of one optimizer step, over all ranks."""
    train_iters: Annotated[int | None, Flag(unset="from --train-samples")] = None
    """Length of the run in optimizer steps; give this or --train-samples."""
    train_samples: Annotated[int | None, Flag(unset="from --train-iters")] = None
    """Length of the run in samples; only the last step may have fewer than --global-batch-size."""
    exit_interval: Annotated[int | None, Flag(unset="run to the end")] = None
    """Save and exit at each iteration that is a multiple of N; the learning-rate schedule stays that of the whole
    run."""
    eval_interval: Annotated[int | None, Flag(unset="no evaluation")] = None
    """Iterations between two evaluations on held-out samples (--split, --valid-data-path); there is one at the end,
    too."""
    eval_iters: Annotated[int | None, Flag(unset="all held-out samples")] = None
    """Largest number of batches in an evaluation of one dataset, the same ones each time."""
    seed: int = 1234
    """Seed of the initial weights and of the order of samples."""
    bf16: bool = False
    """Compute in bfloat16, with float32 master weights and gradient reduction."""
    fp8_format: Annotated[Literal["hybrid", "e4m3"] | None, Flag(unset="no FP8")] = None
    """Compute the matrix products of the decoder in FP8, where hybrid is E4M3 forward and E5M2 for gradients; needs
    TransformerEngine, --bf16, and a GPU with FP8 (Ada, Hopper or newer)."""
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise"] = "delayed"
    """With --fp8-format, how scaling factors are found: from the last 1024 microbatches (delayed), for each tensor
    (tensorwise), or for each block of 128 values (blockwise; needs Hopper or newer and CUDA 12.9)."""
    cross_entropy_loss_fusion: bool = False
    """Fuse the language loss, so that no float32 copy of the logits is kept (with --bf16)."""
    cross_entropy_fusion_impl: Literal["native", "te"] = "native"
    """With --cross-entropy-loss-fusion, the implementation: native is megatron-core's, compiled by torch; te is
    TransformerEngine's kernel, which works in place."""
    gradient_accumulation_fusion: bool = True
    """Add weight gradients to the float32 buffer inside the matrix product: TransformerEngine's layers always can,
    megatron-core's output layer where NVIDIA's apex is installed."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Implementation of the layers: local is torch, transformer_engine is TransformerEngine, and auto is the latter
    with --bf16, where it runs and has a fast attention for packs (cuDNN's on Hopper or newer, or flash-attn), and torch
    elsewhere."""
    recompute_granularity: Annotated[Literal["full", "selective"] | None, Flag(unset="no recomputation")] = (
        None
    )
    """Recompute activations in the backward pass, to save memory: full is whole layers, selective what
    --recompute-modules names."""
    recompute_method: Annotated[Literal["uniform", "block"] | None, Flag(unset="none; full needs one")] = None
    """With --recompute-granularity full, which layers: uniform is each group of --recompute-num-layers, block the first
    --recompute-num-layers of each pipeline stage."""
    recompute_num_layers: Annotated[int | None, Flag(unset="none; full needs one")] = None
    """With --recompute-granularity full, layers of a group (uniform), or layers of each pipeline stage (block)."""
    recompute_modules: Annotated[Words, Flag("MODULE", "core_attn")] = ()
    """With --recompute-granularity selective, the parts of each layer to recompute: core_attn, mlp, or both;
    TransformerEngine's attention always recomputes core_attn."""
    deterministic_mode: bool = False
    """Use only kernels that give the same bits each time, which is slower on GPUs; on CPUs all kernels do."""
    loss_normalization: Literal["global", "microbatch"] = "global"
    """Denominator of the loss: global divides by the labels of the whole step, microbatch is the mean of the means of
    microbatches, as the published runs have it."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule; the defaults are those of the published runs."""

    __pydantic_config__ = _STRICT

    lr: float = 4e-5
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay of the learning rate after the warm-up."""
    lr_warmup_fraction: float = 0.01
    """Share of the optimizer steps in which the learning rate rises from 0 to its peak."""
    lr_overrides: Annotated[dict[str, float], Flag("GLOB LR", "none")] = field(default_factory=dict)
    """Peak learning rates of the parameters whose names match a glob, which override --lr, such as 'vision_model.*'
    4e-4; may be 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay, which is never applied to biases and norms."""
    adam_beta1: float = 0.9
    """Decay rate of the running mean of gradients."""
    adam_beta2: float = 0.999
    """Decay rate of the running mean of squared gradients."""
    adam_eps: float = 1e-8
    """Epsilon in the denominator of the update."""
    clip_grad: float = 0.0
    """Clip gradients to this global norm; 0 does not clip."""


@dataclass(frozen=True)
class DataConfig:
    """Where the samples come from, and how they are packed."""

    __pydantic_config__ = _STRICT

    data_path: Annotated[Words, Flag("PREFIX", "none; needed")] = ()
    """Datasets to train on, each the --output-prefix of tools/preprocess_data.py; several are one dataset, or, with a
    weight before each (0.3 data/a 0.7 data/b), a blend in these shares."""
    valid_data_path: Annotated[Words, Flag("PREFIX", "none")] = ()
    """Datasets for evaluations only (--eval-interval), each the --output-prefix of tools/preprocess_data.py."""
    split: Annotated[str, Flag("TRAIN,VALID")] = "100,0"
    """Shares of each dataset of --data-path to train on and to hold out for evaluations: 99,1 holds out one random
    sample in a hundred, the same ones in every run."""
    data_cache_path: Annotated[str | None, Flag("DIR", "nothing is written")] = None
    """Folder for indices that take time to compute from a dataset; runs may share it."""
    tokenizer_model: Annotated[str | None, Flag("FILE", "not checked")] = None
    """tokenizer.model or tokenizer.json of the datasets, or its folder; a dataset made with another one is refused."""
    mock_data: bool = False
    """Train on synthetic samples instead of --data-path."""
    seq_length: int = 2048
    """Length of a pack, in tokens; samples that are longer are left out, and counted when the run starts."""
    max_images_per_pack: Annotated[int | None, Flag(unset="no limit")] = None
    """Largest number of images in a pack, each tile of an image counted, which limits the memory of their activations;
    samples with more are left out, and counted when the run starts."""
    shuffle: bool = True
    """Shuffle the samples of each epoch, by --seed; without it, they keep the order of the dataset."""
    group_by_modality: bool = False
    """Make each batch either of samples with images or of samples of text alone."""
    image_decoder: Literal["auto", "dali", "threads", "pillow"] = "auto"
    """Decoder of images: dali is DALI (on the GPU, where there is one), threads are fast CPU libraries, pillow is the
    reference, equal bit for bit to the published preprocessing, and auto is dali on GPUs, threads elsewhere."""
    num_workers: int = 2
    """Threads that decode images, on each rank that needs pixels."""
    mmap_bin_files: bool = True
    """Map the .bin files of datasets into memory; without it, they are read piece by piece."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Where the run is saved, and what it starts from."""

    __pydantic_config__ = _STRICT

    save: Annotated[str | None, Flag("DIR", "nothing is saved")] = None
    """Folder of the run, for checkpoints (iter_0000100/ ...) and losses.jsonl."""
    load: Annotated[str | None, Flag("DIR", "start from the beginning")] = None
    """Folder of a run to resume, or one checkpoint in it (iter_0000100); the run goes on with its next sample.
    Without a checkpoint there, it starts from the beginning."""
    ckpt_step: Annotated[int | None, Flag(unset="the latest")] = None
    """Iteration to take of --load; without --load, of --pretrained-checkpoint. Every start with it begins there, so
    leave it out of a job that is requeued."""
    save_interval: Annotated[int | None, Flag(unset="only at the end")] = None
    """Iterations between two checkpoints; there is one at the end, too."""
    async_save: bool = False
    """Write checkpoints in the background, while training goes on."""
    keep_last: Annotated[int | None, Flag(unset="all are kept")] = None
    """Newest checkpoints to keep; older ones are deleted."""
    save_retain_interval: Annotated[int | None, Flag(unset="none of the older ones")] = None
    """With --keep-last, keep the older checkpoints whose iteration is a multiple of N, too."""
    retain_weights_only: bool = False
    """Delete the optimizer state of the checkpoints that --save-retain-interval keeps, about six sevenths of their
    bytes."""
    pretrained_checkpoint: Annotated[str | None, Flag("DIR", "random weights")] = None
    """Folder whose weights, and nothing else, the run starts from: a run, one checkpoint of it (iter_0000100), or
    a model in the published Hugging Face layout."""


@dataclass(frozen=True)
class FaultConfig:
    """What happens after a bad step: one whose loss or gradient norm is not finite, or a spike."""

    __pydantic_config__ = _STRICT

    bad_step_policy: Literal["stop", "skip"] = "stop"
    """What to do about a bad step: stop saves the state before it and ends the run, skip leaves its update out and goes
    on; SAVE/bad_steps.jsonl lists its samples."""
    spike_factor: Annotated[float | None, Flag(unset="no step is a spike")] = None
    """Count a loss or gradient norm of more than X times the median of the last 100 steps as a spike."""
    rerun_mode: Literal["disabled", "validate_results"] = "disabled"
    """What is run again: validate_results runs a bad step again, to tell a hardware fault from a bad batch
    (megatron-core's rerun state machine), and checks the gradients of each rank before they are reduced."""


@dataclass(frozen=True)
class LoggingConfig:
    """What is logged, and where."""

    __pydantic_config__ = _STRICT

    log_interval: int = 1
    """Iterations between two log lines."""
    tensorboard_dir: Annotated[str | None, Flag("DIR", "no TensorBoard")] = None
    """Folder for TensorBoard event files."""
    log_straggler: bool = False
    """Name the slowest ranks, in forward passes and in data loading, with each log line."""


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
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    faults: FaultConfig = field(default_factory=FaultConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        if self.vision is None:
            object.__setattr__(self, "vision", family_defaults.settings(self.family))

    def to_dict(self) -> dict[str, Any]:
        """The tree as nested plain dictionaries, for YAML or JSON."""
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
    def chunk_layers(self) -> tuple[int, ...]:
        """Decoder layers of each model chunk (see `ParallelConfig.chunk_layers`)."""
        return self.parallel.chunk_layers(self.model.num_layers)

    @property
    def stage_layers(self) -> tuple[int, ...]:
        """Decoder layers of each pipeline stage, over all its chunks (see `chunk_layers`)."""
        chunks, stages = self.chunk_layers, self.parallel.pipeline_model_parallel_size
        return tuple(sum(chunks[stage::stages]) for stage in range(stages))

    @property
    def virtual_pipeline_model_parallel_size(self) -> int | None:
        """Model chunks of a rank under the interleaved schedule, None without it."""
        chunks = len(self.chunk_layers) // self.parallel.pipeline_model_parallel_size
        return chunks if chunks > 1 else None

    @property
    def row_multiple(self) -> int:
        """Required multiple of a pack's rows on each rank, for matrix products in FP8."""
        if self.training.fp8_format is None:
            return 1
        # TransformerEngine's assert_dim_for_fp8_exec, and a block's side: a sequence-parallel rank quantises its rows
        # before they are gathered, so that they must be whole blocks (assert_dim_for_all_gather).
        return 128 if self.training.fp8_recipe == "blockwise" else 16
