"""The config of an upscaling network, which is inferred from the shapes of a file's tensors."""

import dataclasses
from typing import ClassVar

from jaxdiff.config.base import Config


@dataclasses.dataclass(frozen=True)
class RRDBConfig(Config):
    """A residual-in-residual dense network (Wang et al. 2018, ESRGAN); defaults are Real-ESRGAN's x4plus."""

    CLASS_NAME: ClassVar[str] = "RRDBNet"
    num_block: int = 23  # residual-in-residual dense blocks
    num_feat: int = 64  # channels between blocks
    num_grow_ch: int = 32  # channels that each convolution of a dense block adds
    upsamples: int = 2  # 2x upsampling layers at the end
    unshuffle: int = 1  # factor of the pixel unshuffle at the start: 2 in the x2 network, 4 in the x1

    @property
    def scale(self) -> int:
        """The factor by which a side grows."""
        return 2**self.upsamples // self.unshuffle

    @property
    def reach(self) -> int:
        """Radius of the receptive field, in pixels of the small image: one for each convolution."""
        return self.unshuffle * (15 * self.num_block + 2) + self.upsamples + 2
