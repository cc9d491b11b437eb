"""The command that trains a vision tower: `torchrun --nproc-per-node N -m megatron_eve.train_tower --preset ...`.

What differs from `pretrain.py` is what is trained (`training/tower/run.py`) and which flags there are.
"""

from __future__ import annotations


def main() -> None:
    """Parse and check the configuration, then join the other ranks and train."""
    from megatron_eve.config.flags import TRAIN_TOWER
    from megatron_eve.pretrain import run_training

    run_training(TRAIN_TOWER)


if __name__ == "__main__":
    main()
