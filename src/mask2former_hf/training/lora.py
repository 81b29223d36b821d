"""Low-rank updates of a trained model (Hu et al., "LoRA", ICLR 2022) through PEFT."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from ..data.json_files import write_json

CLASSES = "class_predictor"
NEW_HEAD = (CLASSES, "transformer_module", "pixel_level_module.decoder", "pixel_level_module.neck")
CLASSIFIERS = (CLASSES, "transformer_module.classifier")  # of masks, and of pixels
ENCODER = "pixel_level_module.encoder."
ADAPTER = "adapter"  # folder of a run's output


def with_lora(model: nn.Module, rank: int, targets: Sequence[str] | None = None, new_head: bool = False):
    """A PEFT model around the model, which is changed in place: its weights are frozen but for what is named here.

    Args:
        model: `Mask2FormerForUniversalSegmentation`.
        rank: of the updates of linear layers, which start at zero.
        targets: ends of the names of the linear layers that get one, such as "q_proj"; None for all.
        new_head: the model's head has random weights, so that it trains whole, with the neck of a ViT, and updates
            are for the backbone alone. Otherwise the classifier trains whole, if it is a layer of its own, all other
            linear layers by updates, and convolutions, norms and embeddings not at all.

    Returns:
        `peft.PeftModel`; `save_pretrained` writes the updates and what trains whole.

    Raises:
        ValueError: for targets that no linear layer has, with the names that there are.
        ImportError: without PEFT.
    """
    from peft import LoraConfig, get_peft_model

    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != CLASSES and (ENCODER in name or not new_head)
    ]
    chosen = [name for name in linear if targets is None or name.endswith(tuple(f".{end}" for end in targets))]
    if not chosen:
        ends = sorted({name.rsplit(".", 1)[-1] for name in linear})
        raise ValueError(
            f"lora_target={' '.join(targets or ())}: no linear layer's name ends so; there are {', '.join(ends)}"
        )
    names = {name for name, module in model.named_modules() if any(True for _ in module.parameters())}
    whole = [name for name in (NEW_HEAD if new_head else CLASSIFIERS) if {name, f"model.{name}"} & names]
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=chosen, modules_to_save=whole))


def save_and_merge(model, folder: str | Path):
    """Write the adapter of a PEFT model into a folder, and return the model with the updates in its weights.

    Of a base model that is a folder the file has the name, not the path, which is of this machine; PEFT's card, which
    has the path as well, is left out.
    """
    model.save_pretrained(str(folder))
    (Path(folder) / "README.md").unlink(missing_ok=True)
    file = Path(folder) / "adapter_config.json"
    fields = json.loads(file.read_text())
    if os.path.exists(fields.get("base_model_name_or_path") or ""):
        fields["base_model_name_or_path"] = Path(fields["base_model_name_or_path"]).resolve().name
        write_json(file, fields)
    return model.merge_and_unload()
