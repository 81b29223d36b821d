"""Settings for Mask2Former over a plain ViT, with the sources that they were taken from.

None of these was run at its size with this package. What a source does not say is left open, and what it does
otherwise than a run here stands beside it.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class ViTRecipe:
    """Settings of one source.

    Args:
        name: such as "coco-panoptic-dinov2-l-adapter".
        class_set: as `mask2former_hf.data.classes.ClassTable.load` takes it.
        settings: fields of `TrainingSettings`; `batch_size` is that of a step, of all processes together.
        source: repository, commit, and what was trained there.
        differs: what was different there and is not in the settings.
    """

    name: str
    class_set: str
    settings: dict
    source: str
    differs: str

    def implied(self, model: str | None, steps: int | None, epochs: float | None) -> dict:
        """The settings, but for those that a given checkpoint or length of the run replaces."""
        replaced = set() if model is None else {"backbone", "vit_neck"}
        replaced |= set() if steps is None and epochs is None else {"steps", "epochs"}
        return {name: value for name, value in self.settings.items() if name not in replaced}

    def __str__(self) -> str:
        return f"{self.name}: from {self.source}. There otherwise: {self.differs}. Not run at this size here."


@cache
def _recipes() -> dict[str, ViTRecipe]:
    rows = json.loads((Path(__file__).parent / "vit_recipes.json").read_text(encoding="utf-8"))
    return {name: ViTRecipe(name, **fields) for name, fields in rows.items()}


def vit_recipe_names() -> list[str]:
    return list(_recipes())


def vit_recipe(name: str | None) -> ViTRecipe | None:
    """A recipe by name; None for a name that is none of these."""
    return _recipes().get(name)
