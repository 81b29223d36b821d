"""The maps of a frozen backbone, kept on disk: an image that comes again unchanged does not go through it again."""

import hashlib
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.modeling_outputs import BackboneOutput
from transformers.utils import logging

from .kept_tensors import bytes_of, keep, kept

logger = logging.get_logger(__name__)


class FeatureCache:
    """Within its block, the maps that a frozen backbone makes of training images are kept in a folder.

    `with FeatureCache(model, "features"): trainer.train()`

    Maps are known by the backbone's weights, the precision, and the pixels of the image on the canvas of its batch:
    what is read is what the backbone gave for exactly these pixels, so that any image may come, but only images that
    come again unchanged (no random augmentation) save anything. A batch is read if all of its images are there, a
    file each, with a checksum; what is damaged is made again, and a warning names the file. Processes may share the
    folder.

    Args:
        model: `Mask2FormerForUniversalSegmentation` whose backbone has no parameter that trains.
        folder: is made; those of other backbones may lie in it, too.

    Attributes:
        read, made: of how many images maps came from the folder, and from the backbone.

    Raises:
        ValueError: for a backbone that trains.
    """

    def __init__(self, model: nn.Module, folder: str | Path):
        self._level = model.model.pixel_level_module
        encoder = self._level.encoder
        if trained := [name for name, parameter in encoder.named_parameters() if parameter.requires_grad]:
            raise ValueError(
                f"the backbone trains ({trained[0]}), so that its maps change: freeze it as a whole "
                "(`training.freezing.freeze_backbone(model)`), or keep none"
            )
        self.folder, self._backbone = Path(folder) / _identity(encoder), encoder.forward
        self._own = vars(encoder).get("forward")  # somebody's, such as a hook of Accelerate
        self.read = self.made = 0
        self._full = False

    def __enter__(self) -> "FeatureCache":
        self.folder.mkdir(parents=True, exist_ok=True)
        self._level.encoder.forward = self._forward
        return self

    def __exit__(self, *reason):
        del self._level.encoder.forward  # the class's is there again
        if self._own is not None:
            self._level.encoder.forward = self._own
        logger.info(f"Maps of {self.read} images were read from {self.folder}, {self.made} made by the backbone.")

    def _forward(self, pixel_values: Tensor, **options) -> BackboneOutput:
        if not self._level.training:  # images to measure on are seen a few times, and at sizes of their own
            return self._backbone(pixel_values, **options)
        paths = [self.folder / f"{_name(image)}.safetensors" for image in pixel_values]
        found = [_load(path, pixel_values.device) for path in paths]
        if len({_shapes(maps) for maps in found}) == 1 and found[0]:
            self.read += len(found)
            return BackboneOutput(feature_maps=tuple(torch.stack(maps) for maps in zip(*found, strict=True)))
        made = self._backbone(pixel_values, **options).feature_maps  # all: parts of a batch are rounded otherwise
        self.made += len(found)
        for index, maps in enumerate(found):
            own = [x[index] for x in made]
            if _shapes(maps) != _shapes(own):
                self._save(paths[index], own)
        return BackboneOutput(feature_maps=made)

    def _save(self, path: Path, maps: list[Tensor]):
        if self._full:
            return
        try:
            keep(path, {str(number): x for number, x in enumerate(maps)})
        except (OSError, SafetensorError) as error:  # the run goes on, as long as it takes without
            self._full = True
            logger.warning(f"No more maps are kept in {self.folder}: {error}")


def _load(path: Path, device: torch.device) -> list[Tensor]:
    """The maps of an image; none if there is no file that could be read."""
    tensors, _ = kept(path) or ({}, None)
    return [tensors[str(number)].to(device) for number in range(len(tensors))]


def _shapes(maps: list[Tensor]) -> tuple:
    return tuple((x.shape, x.dtype) for x in maps)


def make_folder(folder: str | Path):
    """Make it, and see that files can be written there.

    Raises:
        ValueError: if they cannot.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        raise ValueError(f"feature_cache={folder}: {error}; name a folder that can be written") from error


def _identity(encoder: nn.Module) -> str:
    """Of the weights and the configuration of a backbone."""
    digest = hashlib.blake2b(encoder.config.to_json_string().encode(), digest_size=8)
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()


def _name(image: Tensor) -> str:
    """Of the pixels (c, H, W) and the precision in which a backbone sees them."""
    kind = image.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    digest = hashlib.blake2b(f"{tuple(image.shape)} {image.dtype} {autocast}".encode(), digest_size=16)
    digest.update(bytes_of(image))
    return digest.hexdigest()
