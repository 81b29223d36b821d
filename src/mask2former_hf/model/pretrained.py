"""What the models have in common as files and as objects: how they load, start, are saved and are copied."""

from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from .configuration_mask2former import Mask2FormerConfig
from .initialization import initialize

# Of transformers: the module whose functions record outputs, and the mark of a model that has them.
RECORDERS, RECORDING = "transformers.utils.output_capturing", "_output_capturing_hooks_installed"


class Mask2FormerPreTrainedModel(PreTrainedModel):
    """The base of all models here."""

    config: Mask2FormerConfig
    config_class = Mask2FormerConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = [
        "Mask2FormerPixelDecoderEncoderLayer", "Mask2FormerDecoderLayer", "DetrEncoderLayer",
        "SwinStage", "ResNetStage",
    ]  # fmt: skip
    _keys_to_ignore_on_load_missing = [r"encoder\.swin\.layernorm\."]

    def __init__(self, config: Mask2FormerConfig):
        config.validate_architecture()  # again, because from_pretrained sets fields after the config has been checked
        super().__init__(config)

    def save_pretrained(self, *args, **kwargs):
        self.check_config()  # the file would describe another model
        super().save_pretrained(*args, **kwargs)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False):
        # For classes outside transformers the base skips modules without parameters of their own, in case their
        # initialisation overwrites loaded tensors. Ours does not: transformers.initialization looks at each tensor.
        super()._initialize_weights(module)

    def load_state_dict(self, state_dict: Mapping[str, Tensor], *args, **kwargs):
        """As `nn.Module.load_state_dict`, also with the names that a backbone's tensors have in checkpoint files.

        Those differ from the names in memory for Swin. `from_pretrained` translates them; code that reads a file and
        calls this, such as transformers' Trainer when it resumes, would leave the backbone as it is.
        """
        own = self.state_dict()
        if not all(name in own for name in state_dict):
            markers = {name: torch.tensor(number) for number, name in enumerate(own)}
            in_memory, markers = list(own), revert_weight_conversion(self, markers)
            in_files = {name: in_memory[marker.item()] for name, marker in markers.items()}
            state_dict = {
                name if name in own else in_files.get(name, name): tensor for name, tensor in state_dict.items()
            }
        return super().load_state_dict(state_dict, *args, **kwargs)

    def __reduce_ex__(self, protocol):
        """For pickle, `copy.deepcopy` and `torch.save`, without what transformers' backbones have installed to record
        their outputs: functions inside functions, which cannot be pickled. The copy's first forward that needs them
        installs them again; this model keeps its own, so that other threads may use it meanwhile."""
        make, arguments, state, *rest = super().__reduce_ex__(protocol)
        return make, arguments, _state_without_recorders(state, {}), *rest

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if not initialize(module, self.config.init_xavier_std):
            super()._init_weights(module)


def _state_without_recorders(state: dict, made: dict[int, nn.Module]) -> dict:
    """The attributes of a module, without recorders in it and below; `made`: what became of modules, by their id."""
    hooks = [(number, hook) for number, hook in list(state["_forward_hooks"].items()) if hook.__module__ != RECORDERS]
    parts = {
        name: None if module is None else _without_recorders(module, made)
        for name, module in state["_modules"].items()
    }
    state = state | {"_forward_hooks": OrderedDict(hooks), "_modules": parts}
    state.pop(RECORDING, None)
    return state


def _without_recorders(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    """The module itself if there are none; else another with the same parameters."""
    if id(module) not in made:
        before, after = vars(module), _state_without_recorders(vars(module), made)
        same_parts = all(after["_modules"][name] is part for name, part in before["_modules"].items())
        if RECORDING in before or not same_parts or len(after["_forward_hooks"]) < len(before["_forward_hooks"]):
            made[id(module)] = type(module).__new__(type(module))
            vars(made[id(module)]).update(after)
        else:
            made[id(module)] = module
    return made[id(module)]
