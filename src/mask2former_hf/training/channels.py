"""What a run on images of bands takes besides one on photos: their number, scale and normalisation, and its checks."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ..data.pictures import shown_bands
from ..data.statistics import measure_bands
from ..model.channels import MOST_CHANNELS, model_channels
from ..model.channels import check_channels as channels_by_statistics
from .backbones import normalisation_of
from .inflation import INFLATIONS, ZERO
from .setting_checks import check_numbers
from .settings import TrainingSettings, starts_pretrained

STATISTICS = ("image_mean", "image_std", "rescale_factor")
STEPS = ("do_rescale", "do_normalize")  # which of them the processor does
WHITE = {np.dtype(np.uint8): 255, np.dtype(np.uint16): 65535, np.dtype(np.float32): 1}  # is 1 after rescaling
LOOKED_AT = 100  # images, of which means and deviations are taken


class Bands(NamedTuple):
    """What is known of a run's images: fields of the image processor, and in words where they come from."""

    channels: int | None
    fields: Mapping
    reason: str = ""


def check_channels(settings: TrainingSettings):
    """Refuse settings of channels that make no sense, alone or together.

    Raises:
        ValueError: naming the setting, its value and the rule.
    """
    check_numbers(settings, 1, ("channels",), most=MOST_CHANNELS)
    if settings.inflate is None:
        return
    if settings.inflate not in INFLATIONS:
        raise ValueError(f"inflate={settings.inflate}: must be one of {', '.join(INFLATIONS)}")
    if settings.channels is None:
        raise ValueError(f"inflate={settings.inflate}: needs channels=, the number of bands of the images")
    if not starts_pretrained(settings):
        raise ValueError(f"inflate={settings.inflate}: is for trained weights, and these start from random ones")
    if settings.inflate == ZERO and (settings.freeze_backbone is not None or settings.lora is not None):
        raise ValueError("inflate=zero: the first layer is frozen and would never see new bands; give inflate=mean")


def check_inflation(settings: TrainingSettings, old: int):
    """Refuse `inflate` for a model that has as many channels as the images, or more."""
    if settings.inflate is not None and settings.channels <= old:
        raise ValueError(
            f"inflate={settings.inflate}: is about bands beyond the {old} that the weights were trained on, and "
            f"channels={settings.channels} has none; leave it out"
        )


def channels_of_run(settings: TrainingSettings, model) -> int | None:
    """The bands of a run's images: those asked for, or what its checkpoint is for; None for photos.

    Raises:
        ValueError: for `show_bands` that the images do not have.
    """
    channels = settings.channels
    if channels is None and settings.model is not None:
        channels = _channels_of(_own_fields(settings.model))
    if channels is None and model_channels(model.config) != 3:
        channels = model_channels(model.config)
    if settings.show_bands is not None:
        if channels is None:
            raise ValueError(f"show_bands={settings.show_bands}: is for images of bands (channels=); leave it out")
        shown_bands(channels, settings.show_bands)
    return channels


def bands_of_run(settings: TrainingSettings, channels: int | None, dataset) -> Bands:
    """How the processor brings a run's images to the scale of the network.

    As the settings say; else as the checkpoint's own processor does, if it has so many bands; else by mean and
    deviation of every band in the training images, after a factor of 1/255 for 8 bits, 1/65535 for 16, 1 for floats.

    Raises:
        ValueError: for images that differ in type, or have other bands.
    """
    given = {name: value for name in STATISTICS if (value := getattr(settings, name)) is not None}
    given |= {name: value[0] for name, value in given.items() if isinstance(value, list) and len(value) == 1}
    if channels is None:
        return Bands(None, given)
    fields, reason = {"num_channels": channels}, "as given"
    own = {} if settings.model is None else _own_fields(settings.model)
    if own.keys() >= set(STATISTICS) and _channels_of(own) == channels:
        fields |= {name: own[name] for name in (*STATISTICS, *STEPS) if name in own}
        fields |= {"do_rescale": True} if "rescale_factor" in given else {}
        reason = "the checkpoint's"
    elif len(given) < len(STATISTICS):
        measured = measure_bands(dataset, LOOKED_AT)
        factor = given.get("rescale_factor", 1 / WHITE[measured.dtype])
        fields["rescale_factor"] = factor
        fields["image_mean"] = [float(f"{factor * value:.6g}") for value in measured.mean]
        fields["image_std"] = [float(f"{abs(factor) * value:.6g}") for value in measured.std]
        reason = f"measured on {measured.images} images of {measured.dtype}"
    return Bands(channels, fields | given, reason)


def _own_fields(checkpoint: str) -> dict:
    """What the processor of a checkpoint says of channels; empty if there is none."""
    return normalisation_of(checkpoint, names=(*STATISTICS, *STEPS, "num_channels"))


def _channels_of(fields: Mapping) -> int | None:
    return channels_by_statistics(*map(fields.get, ("num_channels", "image_mean", "image_std")))
