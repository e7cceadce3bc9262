"""From an image to what a model was trained on."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """All that is done to an image before a model sees it.

    Attributes:
      size: Height and width in pixels.
      resize: "squash" or "crop", see `images.decode.read_image`.
      mean: Per RGB channel, of images scaled to [0, 1]; ImageNet's by default.
      std: Likewise, above 0.
    """

    size: int
    resize: str = "squash"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
