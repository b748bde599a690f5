"""Tiny OWL-ViT and OWLv2 checkpoints with random weights, whose grid is that of the tiny LLaVA."""

from pathlib import Path

import torch
import transformers

from mmray.models.tiny.checkpoints import tokenizer_of
from mmray.models.tiny.pieces import HEADS, LAYERS, PATCH, SIDE, WIDTH
from mmray.models.tiny.variants import VARIANTS

SHAPE = {"hidden_size": 2 * WIDTH, "intermediate_size": 40, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
NAMES = {"owlvit": "OwlViT", "owlv2": "Owlv2"}


def build_owl(kind: str, folder: Path) -> Path:
    """Write the checkpoint into the folder and return it."""
    name, tokenizer = NAMES[kind], tokenizer_of(VARIANTS["llava"])
    tokenizer.model_max_length = 16
    images = getattr(transformers, f"{name}ImageProcessor")(size={"height": SIDE, "width": SIDE}, do_center_crop=False)
    getattr(transformers, f"{name}Processor")(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    config = getattr(transformers, f"{name}Config")(
        text_config=SHAPE | {"vocab_size": len(tokenizer), "max_position_embeddings": 16},
        vision_config=SHAPE | {"image_size": SIDE, "patch_size": PATCH},
        projection_dim=2 * WIDTH,
    )
    torch.manual_seed(0)
    network = getattr(transformers, f"{name}ForObjectDetection")(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
        network.box_head.dense2.weight.mul_(0.02)  # boxes of random weights would be all or nothing
    network.save_pretrained(folder)
    return folder
