"""From an image to what a model was trained on."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

BACKGROUNDS = ("black", "white")

DEEPEST = 2**16 - 1


def is_window(value: Any) -> bool:
    """Whether a value from a file is two finite numbers, the lower one first."""
    numbers = isinstance(value, list) and [type(one) for one in value]
    return (
        numbers in ([int, int], [int, float], [float, int], [float, float])
        and -math.inf < value[0] < value[1] < math.inf
    )


@dataclasses.dataclass(frozen=True)
class Rendering:
    """How the numbers in an image file become 8 bits where the file does not say it.

    Attributes:
      white: The value of 16-bit images that becomes 255; 0 stays 0.
      window: The values that become 0 and 255, for images of more than 8 bits, signed or floating;
        of DICOM files in their units (Hounsfield). None: `white` counts, and files whose numbers
        are floating or negative are refused.
      background: What lies under transparent pixels, "black" or "white".
    """

    white: int = DEEPEST
    window: tuple[float, float] | None = None
    background: str = "black"

    def card(self) -> dict[str, Any]:
        """Fields of `model.json`: those that are not the default."""
        window = None if self.window is None else list(self.window)
        fields = {"intensity": self.white, "window": window, "background": self.background}
        plain = {"intensity": DEEPEST, "window": None, "background": "black"}
        return {name: value for name, value in fields.items() if value != plain[name]}

    @classmethod
    def of_card(cls, card: Mapping[str, Any]) -> "Rendering":
        """What a card says; the default where it says nothing."""
        low_high = card.get("window")
        window = None if low_high is None else (float(low_high[0]), float(low_high[1]))
        return cls(card.get("intensity", DEEPEST), window, card.get("background", "black"))


PLAIN = Rendering()
"""Of images with 8 bits."""


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """All that is done to an image before a model sees it.

    Attributes:
      size: Height and width in pixels.
      resize: "squash" or "crop", see `images.decode.read_image`.
      mean: Per RGB channel, of images scaled to [0, 1]; ImageNet's by default.
      std: Likewise, above 0.
      rendering: How files of more than 8 bits and transparent ones become 8 bits.
    """

    size: int
    resize: str = "squash"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    rendering: Rendering = PLAIN
