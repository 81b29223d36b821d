"""How many channels images have: photos become red, green and blue, anything else is 1 to 16 bands as they are.

No torch in here: runtimes without it ask the same.
"""

import reprlib

MOST_CHANNELS = 16


def statistic_lengths(*statistics) -> set[int]:
    """How many numbers `image_mean` and `image_std` have, where they have more than one for all channels."""
    return {len(value) for value in statistics if isinstance(value, list | tuple)} - {1}


def image_channels(processor) -> int | None:
    """The bands that a processor takes; None for photos, which become three channels of 8 bits.

    Args:
        processor: an image processor, ours or transformers'. Without `num_channels`, `image_mean` or `image_std` of
            another length than 3 say that images are bands.

    Raises:
        ValueError: if the three contradict each other.
    """
    mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
    return check_channels(getattr(processor, "num_channels", None), mean, std)


def check_channels(num_channels: int | None, image_mean, image_std) -> int | None:
    """See `image_channels`."""
    lengths = statistic_lengths(image_mean, image_std)
    channels = num_channels if num_channels is not None else min(lengths - {3}, default=3)
    for name, value in (("image_mean", image_mean), ("image_std", image_std)):
        if statistic_lengths(value) - {channels}:
            raise ValueError(
                f"{name}={reprlib.repr(list(value))} has {len(value)} numbers, but num_channels, or the other one of "
                f"image_mean and image_std, says {channels} channels; give {channels} numbers, or one for all."
            )
    return None if num_channels is None and channels == 3 else channels


def model_channels(config) -> int:
    """The channels of the images that a model takes, by its config, ours or transformers'."""
    return getattr(getattr(config, "backbone_config", None), "num_channels", 3)


def check_same_channels(config, processor):
    """Refuse a processor that makes images of other channels than the model takes.

    Raises:
        ValueError: naming both.
    """
    wanted, made = model_channels(config), image_channels(processor) or 3
    if wanted != made:
        raise ValueError(
            f"the model takes images of {wanted} channels (backbone_config.num_channels), and its processor makes "
            f"{made}: give the processor num_channels={wanted}, and image_mean and image_std of that length"
        )
