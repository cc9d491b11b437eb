"""What flags of other programs are called here.

`OTHER_NAMES` holds flags of Megatron-LM (its megatron/training/arguments.py) and arguments of Hugging Face's trainer
that have another name here, or need none.
"""

from __future__ import annotations

_LLAMA = "the decoder is Llama's (RMSNorm, SwiGLU, rotary positions), so nothing is to be said of it"
_ONE_FORMAT = "every checkpoint has megatron-core's format torch_dist, which loads under any layout"
_TOKENIZER = "the tokenizer is one file, a tokenizer.model or tokenizer.json: --tokenizer-model FILE"
_WARMUP = "the warm-up is a share of the run: --lr-warmup-fraction"
_LENGTH = "the rate decays over the whole run, which --train-iters or --train-samples sets"
_WEIGHTS_ALONE = "--pretrained-checkpoint FOLDER starts from the weights alone"
_PICKED_UP = "--load FOLDER resumes from the newest whole checkpoint of a run"
_RECOMPUTE = "use --recompute-granularity full (or selective)"
_PACKS = "samples are always kept apart in a pack, with positions of their own"
_FROM_TORCHRUN = "torchrun sets it for each rank"
_MICRO_BATCH = (
    "samples are packed into microbatches of at most --seq-length tokens; set that and --global-batch-size"
)
_NO_EXPERTS = "the decoder has no mixture of experts"
_FP8 = "use --fp8-format hybrid or e4m3"
_NO_TRACKER = "curves go to SAVE/losses.jsonl and --tensorboard-dir"

OTHER_NAMES: dict[str, str] = {
    # Megatron-LM: batches and length of a run
    "--micro-batch-size": _MICRO_BATCH,
    "--rampup-batch-size": "the batch size is the same in every step: --global-batch-size",
    "--lr-warmup-iters": _WARMUP,
    "--lr-warmup-samples": _WARMUP,
    "--lr-decay-iters": _LENGTH,
    "--lr-decay-samples": _LENGTH,
    "--exit-duration-in-mins": "Slurm's --time and --signal do it: the run saves and leaves (docs/operations.md)",
    "--exit-signal-handler": "always on: SIGTERM and SIGUSR1 save and leave",
    # checkpoints
    "--finetune": _WEIGHTS_ALONE,
    "--no-load-optim": _WEIGHTS_ALONE,
    "--no-load-rng": _WEIGHTS_ALONE,
    "--no-save-optim": "use --retain-weights-only with --save-retain-interval",
    "--no-save-rng": "a checkpoint always holds the random state, which an exact resume needs",
    "--ckpt-format": _ONE_FORMAT,
    "--dist-ckpt-format": _ONE_FORMAT,
    "--use-dist-ckpt": _ONE_FORMAT,
    "--auto-detect-ckpt-format": _ONE_FORMAT,
    "--use-checkpoint-args": "give the --preset or --config of the checkpoint; other sizes than its own are refused",
    "--non-persistent-save-interval": "use --save-interval with --keep-last",
    "--convert-checkpoint": "use tools/convert_checkpoint.py",
    # tokenizer and data
    "--tokenizer-type": _TOKENIZER,
    "--vocab-file": _TOKENIZER,
    "--merge-file": _TOKENIZER,
    "--make-vocab-size-divisible-by": "megatron-core pads --vocab-size by itself",
    "--train-data-path": "use --data-path",
    "--valid-data-path-prefix": "use --valid-data-path",
    "--test-data-path": "use --valid-data-path, or tools/generate.py for benchmarks",
    "--dataloader-type": "the order of the samples follows from --seed and the consumed samples alone",
    "--reset-position-ids": _PACKS,
    "--reset-attention-mask": _PACKS,
    "--eod-mask-loss": "labels are made by tools/preprocess_data.py, from its --template",
    "--decoder-seq-length": "use --seq-length",
    "--encoder-seq-length": "use --seq-length",
    # model
    "--normalization": _LLAMA,
    "--swiglu": _LLAMA,
    "--disable-bias-linear": _LLAMA,
    "--position-embedding-type": _LLAMA,
    "--use-rotary-position-embeddings": _LLAMA,
    "--untie-embeddings-and-output-weights": _LLAMA,
    "--kv-channels": "it is --hidden-size / --num-attention-heads",
    "--group-query-attention": "use --num-query-groups",
    "--hidden-dropout": "the decoder has no dropout",
    "--attention-dropout": "the decoder has no dropout",
    "--num-experts": _NO_EXPERTS,
    "--expert-model-parallel-size": _NO_EXPERTS,
    "--use-mcore-models": "always on: the layers are megatron-core's",
    # layout and kernels
    "--num-virtual-stages-per-pipeline-rank": "use --num-layers-per-virtual-pipeline-stage, or "
    "--pipeline-model-parallel-layout",
    "--account-for-embedding-in-pipeline-split": "use --pipeline-model-parallel-layout",
    "--account-for-loss-in-pipeline-split": "use --pipeline-model-parallel-layout",
    "--distributed-backend": "NCCL on GPUs, gloo on CPUs",
    "--world-size": _FROM_TORCHRUN,
    "--rank": _FROM_TORCHRUN,
    "--local-rank": _FROM_TORCHRUN,
    "--fp16": "use --bf16",
    "--fp8": _FP8,
    "--fp8-hybrid": _FP8,
    "--fp8-e4m3": _FP8,
    "--use-flash-attn": "use --transformer-impl transformer_engine, which chooses a fused attention",
    "--attention-backend": "use --transformer-impl transformer_engine, which chooses a fused attention",
    "--recompute-activations": "use --recompute-granularity selective",
    "--checkpoint-activations": "use --recompute-granularity full",
    "--optimizer": "the optimizer is AdamW",
    # logs
    "--wandb-project": _NO_TRACKER,
    "--log-throughput": "always logged",
    # Hugging Face's trainer, and the published training scripts, which use it
    "--learning-rate": "use --lr",
    "--lr-scheduler-type": "use --lr-decay-style",
    "--warmup-ratio": _WARMUP,
    "--warmup-steps": _WARMUP,
    "--output-dir": "use --save",
    "--resume-from-checkpoint": "use --load",
    "--model-name-or-path": "use --pretrained-checkpoint",
    "--version": "a template is chosen when the data is made: tools/preprocess_data.py --template",
    "--image-folder": "images are read when the data is made: tools/preprocess_data.py --image-root",
    "--model-max-length": "use --seq-length; texts are cut when the data is made (tools/preprocess_data.py)",
    "--max-seq-length": "use --seq-length",
    "--per-device-train-batch-size": _MICRO_BATCH,
    "--gradient-accumulation-steps": _MICRO_BATCH,
    "--num-train-epochs": "say the length by --train-samples (samples of the data x epochs) or --train-iters",
    "--max-steps": "use --train-iters",
    "--max-grad-norm": "use --clip-grad",
    "--save-steps": "use --save-interval",
    "--save-total-limit": "use --keep-last",
    "--logging-steps": "use --log-interval",
    "--eval-steps": "use --eval-interval",
    "--gradient-checkpointing": _RECOMPUTE,
    "--dataloader-num-workers": "use --num-workers",
    "--report-to": _NO_TRACKER,
    "--deepspeed": "use --use-distributed-optimizer and the parallel sizes",
}
