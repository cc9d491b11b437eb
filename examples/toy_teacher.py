"""Make a toy teacher: CLIP's vision tower in Hugging Face layout, tiny and with random weights.

It has the shape that `--preset eve_tiny` expects of a teacher, so that a recipe can be tried without the real CLIP
ViT-L/14-336. What it teaches means nothing, but it is a function of the picture.

    python examples/toy_teacher.py teacher
"""

from __future__ import annotations

from pathlib import Path

from megatron_eve.config import PRESETS
from megatron_eve.models.eve.config import EVEConfig
from megatron_eve.models.registry import find_family
from megatron_eve.runtime.command_line import command_parser_of


def save_toy_teacher(folder: Path, vision: EVEConfig) -> Path:
    """Save a seeded random tower of the width and picture size that a model expects; returns the folder."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    width = vision.teacher_hidden_size
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=vision.teacher_size,
        patch_size=14,
    )
    CLIPVisionModel(config).save_pretrained(folder)
    return folder


def main() -> None:
    """Read the command line and save."""
    parser = command_parser_of(__doc__)
    parser.add_argument(
        "folder", type=Path, metavar="DIR", help="folder for config.json and model.safetensors"
    )
    parser.add_argument(
        "--preset",
        default="eve_tiny",
        choices=find_family("eve").presets,
        help="model sizes that it has to fit",
    )
    arguments = parser.parse_args()
    print(f"-> {save_toy_teacher(arguments.folder, PRESETS[arguments.preset].vision)}")


if __name__ == "__main__":
    main()
