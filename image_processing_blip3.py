# SPDX-License-Identifier: Apache-2.0
"""Images to views: `pixel_values` and `image_sizes` of BLIP-3 (arXiv:2408.08872, section 3.1 "any-resolution").

    image (H, W) --- resize, ignoring aspect ----------------------------> global view, always first
         |
         +-- choose_grid -> (R, C) -- resize, keeping aspect -- pad black --> R * C tiles, row by row

A view is the global view or a tile. Letters: I images of the whole batch in reading order, T the constant number of
view slots (1 + the largest grid), S the side of a view in pixels, R x C the grid chosen for one image. `pixel_values`
is (I, T, 3, S, S), slots an image does not use are zero; `image_sizes` is (I, 2), original (height, width). Which
slots are used is never stored: tiling_blip3.py derives it from the size wherever it is needed. `pixel_values` are
scaled numbers, or the bytes themselves: a quarter of the memory, scaled by the model on its device to the same bits.
"""

import ctypes
import difflib
import inspect
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFile
from PIL import __version__ as pillow_version
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import ChannelDimension, PILImageResampling
from transformers.processing_utils import ImagesKwargs
from transformers.utils import TensorType, logging

from .configuration_blip3 import RELEASED_TILE_GRIDS, check_image_settings, expose_in_package
from .opening_blip3 import (
    ImageError,
    decode_smaller,
    entries_of,
    is_opened_here,
    is_source,
    open_source,
    size_before_decoding,
    turn_upright,
)
from .tiling_blip3 import GLOBAL_VIEW_ONLY, count_view_slots, fit_inside, grid_of, letterbox, scale_pixels

logger = logging.get_logger(__name__)


class Blip3ImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """What may be set per call or at `from_pretrained`, beside transformers' own image arguments.

    Attributes:
        tile_grids: `from_pretrained` only, together with the model's.
        do_image_splitting: False gives the global view alone.
        do_exif_transpose: True turns every image upright as its EXIF tag says, False none, None those opened here.
        resize_backend: `pil` or `torch`.
        pixel_dtype: `float32` or `uint8`.
        max_image_pixels: larger images are refused.
    """

    tile_grids: list[list[int]] | None
    do_image_splitting: bool | None
    do_exif_transpose: bool | None
    resize_backend: str | None
    pixel_dtype: str | None
    max_image_pixels: int | None


class Blip3ImageProcessor(BaseImageProcessor):
    """Cuts images into a global view and tiles.

    An image is a path, an open file, bytes of a file, an http(s) or data URL, a base64 string, a {"bytes", "path"}
    cell of `datasets`, a PIL image of any mode, or a numpy array or torch tensor, (H, W), (H, W, C) or (C, H, W) with
    1, 3 or 4 channels. Where both ends of a shape could be channels, arrays are taken as (H, W, C) and tensors as
    (C, H, W); `input_data_format` decides otherwise. Transparent images are laid on white, 16-bit ones reduced to 8;
    PIL modes I and I;16 count as 16-bit. Arrays of integers hold 0 to 255 (uint16: 0 to 65535), arrays of floats 0 to
    1, or 0 to 255 when a value reaches 2. What is opened here, that is all but PIL images, arrays and tensors, is
    turned upright as its EXIF tag says.

    Args:
        size: {"height": S, "width": S}, a view in pixels; the vision tower's `image_size`.
        tile_grids: candidate layouts, (rows, columns) in tiles; must equal the model's `config.tile_grids`.
        do_image_splitting: False gives each image as its global view alone and marks it by `image_sizes` (0, 0).
        resize_backend: `pil` is bit-exact with the released checkpoints' preprocessing; `torch` resizes with
            antialiased uint8 interpolation, faster and 1/255 away on under 1 % of a photograph's values (2/255 on
            noise).
        resample: PIL filter; the torch backend knows bicubic and bilinear.
        do_rescale: scale 8-bit values by `rescale_factor`.
        rescale_factor: the factor, 1/255.
        do_normalize: subtract `image_mean` and divide by `image_std`.
        image_mean: one number per channel, or one for all.
        image_std: one number per channel, or one for all.
        do_convert_rgb: kept for transformers; images are always converted to RGB.
        do_exif_transpose: turn images upright as their EXIF tag says. None turns what is opened here and leaves PIL
            images as given, as the released preprocessing does; True turns PIL images as well; False turns nothing.
        max_image_pixels: larger images are refused before they are decoded (decompression bombs).
        pixel_dtype: `float32` gives scaled values. `uint8` gives bytes, a quarter of the memory, which the model
            scales on its device by `rescale_factor`, `image_mean` and `image_std` of its configuration: to the same
            bits, where they are this processor's.

    Raises:
        ValueError: on a misspelt argument or a value that cannot work.
    """

    model_input_names = ["pixel_values", "image_sizes"]
    valid_kwargs = Blip3ImageProcessorKwargs

    def __init__(
        self,
        size: dict[str, int] | None = None,
        tile_grids: Sequence[Sequence[int]] | None = RELEASED_TILE_GRIDS,
        do_image_splitting: bool = True,
        resize_backend: str = "pil",
        resample: int = PILImageResampling.BICUBIC,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = True,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        do_convert_rgb: bool = True,
        do_exif_transpose: bool | None = None,
        max_image_pixels: int = 178_956_970,
        pixel_dtype: str = "float32",
        **kwargs: Any,
    ):
        _refuse_misspelt(kwargs)
        super().__init__(**kwargs)
        self.size = {"height": 384, "width": 384} if size is None else _copy(size)
        self.tile_grids = _copy(() if tile_grids is None else tile_grids)
        self.do_image_splitting = do_image_splitting
        self.resize_backend = resize_backend
        self.resample = resample
        self.do_rescale = do_rescale
        self.rescale_factor = rescale_factor
        self.do_normalize = do_normalize
        self.image_mean = _per_channel(0.5 if image_mean is None else image_mean)
        self.image_std = _per_channel(0.5 if image_std is None else image_std)
        self.do_convert_rgb = do_convert_rgb
        self.do_exif_transpose = do_exif_transpose
        self.max_image_pixels = max_image_pixels
        self.pixel_dtype = pixel_dtype
        check_image_settings(vars(self))

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Hand overrides to the constructor, which checks them; transformers 4.57 would set them afterwards."""
        own = {name: kwargs.pop(name) for name in _SETTINGS & kwargs.keys()}
        _refuse_misspelt(kwargs)
        return super().from_dict({**image_processor_dict, **own}, **kwargs)

    @property
    def tile_size(self) -> int:
        """Side of a tile in pixels."""
        return self.size["height"]

    @property
    def num_view_slots(self) -> int:
        """T, tiles of the largest grid and the global view: constant, so that any two batches concatenate."""
        return count_view_slots(self.tile_grids)

    def grid_of(self, height: int, width: int, do_image_splitting: bool | None = None) -> tuple[int, int]:
        """(rows, columns) of the tiles an image of (height, width) pixels is cut into; (0, 0) without tiles."""
        image_size = self.image_size_for_model(height, width, do_image_splitting)
        return grid_of(image_size, self.tile_grids, self.tile_size)

    def image_size_for_model(self, height: int, width: int, do_image_splitting: bool | None = None) -> tuple[int, int]:
        """The `image_sizes` row of an image of (height, width) pixels."""
        splits = self.do_image_splitting if do_image_splitting is None else do_image_splitting
        return (height, width) if splits else GLOBAL_VIEW_ONLY

    def fetch_images(self, images: Any) -> Any:
        """Open paths, files, bytes, URLs, base64 strings and `datasets` cells, keeping the nesting.

        Images opened here are neither decoded nor turned yet: `preprocess` does both, whose arguments may forbid it.
        Other entries pass through.

        Raises:
            ValueError: if an entry cannot be opened as an image.
        """
        entries = entries_of(images)
        if entries is not None:
            return [self.fetch_images(image) for image in entries]
        if not is_source(images):
            return images
        return open_source(images)

    def open_image(self, image: Any) -> Image.Image:
        """Open one image as `preprocess` reads it: decoded, RGB, turned upright where `do_exif_transpose` says so.

        Raises:
            ValueError: if it cannot be opened or decoded, or is too large.
        """
        opened, options = self.fetch_images(image), self._options({})
        try:
            opened = self._check(opened, options)
            return _flatten_to_rgb(turn_upright(opened) if _is_turned(opened, options) else opened)
        except Exception as error:  # decoders raise whatever a broken file makes them meet
            raise ValueError(f"Image 1 of 1: {_explain(error)}") from error

    def preprocess(self, images: Any, return_tensors: str | TensorType | None = None, **kwargs: Any) -> BatchFeature:
        """Turn images into model inputs.

        Args:
            images: one image or a list, nested or not; read in order.
            return_tensors: "pt" for torch; "np" or None for numpy.
            **kwargs: any argument of the class except `size` and `tile_grids`, for this call; and transformers'
                `input_data_format` and `device`.

        Returns:
            `pixel_values` (I, T, 3, S, S), float32 or uint8 as `pixel_dtype` says, and `image_sizes` (I, 2) int64.

        Raises:
            ValueError: naming the image at fault, or an argument that cannot be honoured.
        """
        options = self._options(kwargs)
        given = _flatten(self.fetch_images(images))
        if not given:
            raise ValueError(
                "images is empty but at least one image is needed. A text-only prompt was probably given an empty "
                "list: leave images out or pass None."
            )
        shape = (len(given), self.num_view_slots, 3, self.tile_size, self.tile_size)
        pixel_values = np.zeros(shape, dtype=options["pixel_dtype"])  # slots that no one writes cost no memory
        num_threads = min(len(given), torch.get_num_threads(), MOST_THREADS) if _are_apart(given) else 1
        options["num_threads"] = torch.get_num_threads() if num_threads == 1 else 1  # for one image
        fill = partial(self._fill_numbered, given, pixel_values, options)
        sizes = _map_in_threads(fill, range(len(given)), num_threads)
        return self._package(pixel_values, np.array(sizes, dtype=np.int64), return_tensors, options)

    def _package(
        self, pixel_values: np.ndarray, image_sizes: np.ndarray, return_tensors: Any, options: dict
    ) -> BatchFeature:
        data = {"pixel_values": pixel_values, "image_sizes": image_sizes}
        if return_tensors in ("pt", TensorType.PYTORCH):
            return BatchFeature({name: torch.from_numpy(a).to(options["device"]) for name, a in data.items()})
        return BatchFeature(data, tensor_type=return_tensors)

    def _options(self, kwargs: dict) -> dict:
        """Merge call arguments over the attributes and refuse what cannot be honoured per call."""
        options = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        options |= {"device": None, "input_data_format": None}
        for name, value in kwargs.items():
            if value is None:
                continue
            if name in ("size", "tile_grids"):
                if _copy(value) == options[name]:
                    continue
                raise ValueError(
                    f"{name} was given for one call ({value!r}) but the model counts views from its own configuration "
                    f"({options[name]!r}) and both must agree. To change it, pass {name} to from_pretrained of the "
                    "processor and the matching value to the model's configuration."
                )
            if name in options:
                options[name] = _per_channel(value) if name in ("image_mean", "image_std") else value
            elif name not in self.valid_kwargs.__annotations__:
                close = difflib.get_close_matches(name, options, n=1)
                hint = f"Did you mean {close[0]!r}?" if close else f"Known arguments: {', '.join(sorted(options))}."
                raise ValueError(
                    f"The image processor was called with the unknown argument {name!r} ({value!r}); expected one of "
                    f"its own. It is probably misspelt. {hint}"
                )
            elif name in _UNSUPPORTED and value != _UNSUPPORTED[name]:
                logger.warning_once(f"Blip3ImageProcessor ignores {name}={value!r}: tiling fixes size and layout.")
        check_image_settings(options)
        if options["input_data_format"] not in (None, *ChannelDimension):
            raise ValueError(
                f"input_data_format is {options['input_data_format']!r} but must be 'channels_first' or "
                "'channels_last'. It is probably misspelt: leave it out to have arrays and tensors told apart."
            )
        return options

    def _check(self, image: Any, options: dict) -> Image.Image:
        """Refuse what is empty or too large; returns a PIL image of any mode, decoded or not."""
        if not isinstance(image, Image.Image):
            image = _array_to_image(image, options["input_data_format"])
        if image.width < 1 or image.height < 1:
            raise ImageError(
                f"it is {image.height} x {image.width} pixels (height x width) but both sides must be positive. "
                "It was probably cropped to nothing: check the crop or drop the image."
            )
        if image.width * image.height > options["max_image_pixels"]:
            raise ImageError(
                f"it has {image.width * image.height} pixels but at most {options['max_image_pixels']} are "
                "decoded. It is probably a decompression bomb or a scan: downscale it, or raise max_image_pixels if "
                "you trust it."
            )
        return image

    def _fill_numbered(self, given: list, pixel_values: np.ndarray, options: dict, index: int) -> tuple[int, int]:
        """Fill the slots of one image of a batch; errors say which one it is."""
        try:
            return self._fill_slots(pixel_values[index], given[index], options)
        except Exception as error:  # decoders raise whatever a broken file makes them meet
            raise ValueError(f"Image {index + 1} of {len(given)}: {_explain(error)}") from error

    def _fill_slots(self, slots: np.ndarray, source: Any, options: dict) -> tuple[int, int]:
        """Write the views of one image into its (T, 3, S, S) zeros; returns its `image_sizes` row.

        The torch backend decodes a JPEG no larger than it needs: at least twice what any view is resized to.
        """
        image = self._check(source, options)
        is_turned, splits = _is_turned(image, options), options["do_image_splitting"]
        size = size_before_decoding(image, is_turned) if options["resize_backend"] == "torch" else None
        if size is not None:
            views = self._resized_sizes(size, self.image_size_for_model(*size, splits))
            needed = (2 * max(height for height, _ in views), 2 * max(width for _, width in views))
            image = decode_smaller(image, needed, is_turned)
        image = _flatten_to_rgb(turn_upright(image) if is_turned else image)
        size = (image.height, image.width) if size is None else size
        image_size = self.image_size_for_model(*size, splits)
        self._fill_views(slots, image, size, image_size, options)
        return image_size

    def _resized_sizes(self, size: tuple[int, int], image_size: tuple[int, int]) -> list[tuple[int, int]]:
        """(height, width) that an image is resized to: for its global view, and if it has tiles for them together."""
        rows, columns = grid_of(image_size, self.tile_grids, self.tile_size)
        side = self.tile_size
        return [(side, side)] + ([fit_inside(size, (rows * side, columns * side))] if rows else [])

    def _fill_views(
        self,
        slots: np.ndarray,
        image: Image.Image,
        size: tuple[int, int],
        image_size: tuple[int, int],
        options: dict,
    ) -> None:
        """Write the global view and the tiles of an image, decoded at any scale, of original (height, width) `size`.

        All of it in numpy, which no thread waits for: torch would share loops of 0.05 ms out among threads, and beside
        a busy program each of its barriers takes longer than the loop.
        """
        side, (rows, columns) = self.tile_size, grid_of(image_size, self.tile_grids, self.tile_size)
        resize = resize_with_torch if options["resize_backend"] == "torch" else resize_with_pil
        sizes = self._resized_sizes(size, image_size)
        whole, *parts = resize(image, sizes, options["resample"], options["num_threads"])
        slots[0] = whole.transpose(2, 0, 1)
        if parts:
            (top, _), (left, _) = letterbox(size, (rows * side, columns * side))
            for tile in range(rows * columns):
                row, column = divmod(tile, columns)
                _paste(parts[0], (top - row * side, left - column * side), slots[1 + tile])
        if options["pixel_dtype"] == "float32":
            factor = options["rescale_factor"] if options["do_rescale"] else None
            mean, std = (options[name] if options["do_normalize"] else None for name in ("image_mean", "image_std"))
            for view in slots[: 1 + rows * columns]:  # one view at a time stays in the processor's cache
                scale_pixels(view, factor, mean, std)

    def tiles_to_images(self, pixel_values: torch.Tensor) -> list[Image.Image]:
        """Show what the model sees: tiles and global views (N, 3, S, S) as images again, as `preprocess` made them.

        Settings given to that call alone are not known here: the values are read by the processor's own. Integers are
        bytes, whatever the settings.
        """
        values = pixel_values.detach().float().cpu()
        if self.do_normalize and pixel_values.is_floating_point():
            mean, std = (torch.tensor(numbers).view(-1, 1, 1) for numbers in (self.image_mean, self.image_std))
            values = values * std + mean
        if self.do_rescale and pixel_values.is_floating_point():
            values = values / self.rescale_factor
        return [Image.fromarray(view.numpy()) for view in values.round().clamp(0, 255).byte().permute(0, 2, 3, 1)]


_SETTINGS = frozenset(inspect.signature(Blip3ImageProcessor.__init__).parameters) - {"self", "kwargs"}

# Arguments transformers may pass whose other values this processor does not honour.
_UNSUPPORTED = {
    "do_resize": True,
    "do_center_crop": False,
    "do_pad": True,
    "data_format": ChannelDimension.FIRST,
    "crop_size": None,
    "pad_size": None,
}

_PILLOW_CHOOSES_THE_ORDER = int(pillow_version.split(".")[0]) >= 13
STRIP_BYTES = 2**21  # of an image that is resized in strips: fits the processor's cache
MOST_THREADS = 8  # each holds a decoded image
_RESAMPLE_MODES = {PILImageResampling.BICUBIC: "bicubic", PILImageResampling.BILINEAR: "bilinear"}


def resize_with_pil(
    image: Image.Image, sizes: Sequence[tuple[int, int]], resample: int, num_threads: int = 1
) -> list[np.ndarray]:
    """Resize to each (height, width); returns (height, width, 3) uint8 each.

    Pillow lets other threads run meanwhile, so where there are several, the sizes are made side by side.
    """
    return _map_in_threads(partial(_resize_once, image, resample=resample), sizes, min(len(sizes), num_threads))


def _resize_once(image: Image.Image, size: tuple[int, int], resample: int) -> np.ndarray:
    return np.asarray(image.resize((size[1], size[0]), resample))


def resize_with_torch(
    image: Image.Image, sizes: Sequence[tuple[int, int]], resample: int, num_threads: int = 1
) -> list[np.ndarray]:
    """Resize to each (height, width) with torch's antialiased 8-bit kernels; returns (height, width, 3) uint8 each.

    These take a direction at a time, with 8 bits between, in one thread. Where Pillow keeps the image in one piece
    they read it there, else strip by strip, so that it is never copied whole. Sizes whose first pass is the same share
    it.
    """
    mode, (width, height) = _RESAMPLE_MODES[resample], image.size
    first = {size: _size_between((height, width), size) for size in sizes}
    pixels = _pixels_of(image)
    if pixels is None:
        between = _shrink_strips(image, set(first.values()), mode)
    else:  # torch's own order, horizontal first, is faster in one call
        counts = Counter(first.values())
        in_two = [size for size, count in counts.items() if count > 1 or size[1] == width]
        between = {size: _interpolate(pixels, size, mode) if size in in_two else pixels for size in counts}
    resized = [_interpolate(between[first[size]], size, mode) for size in sizes]
    return [each[0].permute(1, 2, 0).numpy()[..., :3] for each in resized]


def _size_between(size: tuple[int, int], new_size: tuple[int, int]) -> tuple[int, int]:
    """Give the size after the first of the two passes, in the order that Pillow picks.

    Since 13.0 that is vertical first where height shrinks more (found by comparing 2,900 random sizes); the other
    order, which is torch's own, changes a quarter of the values.
    """
    (height, width), (new_height, new_width) = size, new_size
    shrinks_in_height = height - new_height > max(0, 2 * (width - new_width))
    return (new_height, width) if _PILLOW_CHOOSES_THE_ORDER and shrinks_in_height else (height, new_width)


def _interpolate(pixels: torch.Tensor, size: tuple[int, int], mode: str) -> torch.Tensor:
    return torch.nn.functional.interpolate(pixels, size, mode=mode, align_corners=False, antialias=True)


def _shrink_strips(
    image: Image.Image, sizes: Collection[tuple[int, int]], mode: str
) -> dict[tuple[int, int], torch.Tensor]:
    """Resize in one direction each, to sizes that have the image's height or width, in strips along that side."""
    found: dict[tuple[int, int], torch.Tensor] = {}
    for axis in (2, 3):  # of (1, 4, H, W): strips are runs of rows, or of columns
        wanted = [size for size in sizes if (size[0] == image.height) == (axis == 2)]
        if not wanted:
            continue
        length, across = (image.height, image.width) if axis == 2 else (image.width, image.height)
        step = max(1, STRIP_BYTES // (4 * across))
        whole = {size: np.empty((1, *size, 4), dtype=np.uint8) for size in wanted}
        for start in range(0, length, step):
            end = min(start + step, length)
            strip = image.crop((0, start, image.width, end) if axis == 2 else (start, 0, end, image.height))
            pixels = _pixels_of(strip)
            if pixels is None:  # someone had Pillow allocate less at once than a strip takes
                pixels = torch.from_numpy(np.array(strip.convert("RGBX"))[None]).permute(0, 3, 1, 2)
            for (height, width), values in whole.items():
                part_size = (end - start, width) if axis == 2 else (height, end - start)
                part = _interpolate(pixels, part_size, mode).permute(0, 2, 3, 1).numpy()
                values[(slice(None),) * (axis - 1) + (slice(start, end),)] = part  # torch.cat would go parallel
        found |= {size: torch.from_numpy(values).permute(0, 3, 1, 2) for size, values in whole.items()}
    return found


class _ArrowArray(ctypes.Structure):
    """`struct ArrowArray` of Arrow's C data interface (arrow.apache.org/docs/format/CDataInterface.html)."""


_ArrowArray._fields_ = [
    *[(name, ctypes.c_int64) for name in ("length", "null_count", "offset", "n_buffers", "n_children")],
    ("buffers", ctypes.POINTER(ctypes.c_void_p)),
    ("children", ctypes.POINTER(ctypes.POINTER(_ArrowArray))),
    *[(name, ctypes.c_void_p) for name in ("dictionary", "release", "private_data")],
]
_pointer_in = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def _pixels_of(image: Image.Image) -> torch.Tensor | None:
    """View the memory of an RGB image as (1, 4, H, W), the fourth channel unused; None where it is in several pieces.

    The view lives no longer than the image. Pillow gives it to users of Arrow; numpy would get a copy of a copy.
    """
    try:
        _, capsule = image.__arrow_c_array__()
    except ValueError:  # more than Pillow allocates at once, 16 MiB if no one changed it
        return None
    array = ctypes.cast(_pointer_in(capsule, b"arrow_array"), ctypes.POINTER(_ArrowArray)).contents
    address = array.children[0].contents.buffers[1]
    values = (ctypes.c_uint8 * (4 * image.width * image.height)).from_address(address)
    return torch.frombuffer(values, dtype=torch.uint8).view(1, image.height, image.width, 4).permute(0, 3, 1, 2)


def _paste(image: np.ndarray, corner: tuple[int, int], tile: np.ndarray) -> None:
    """Write what a tile (3, S, S) shows of an image (height, width, 3) whose corner is at (y, x) of it, or outside."""
    (y, x), side = corner, tile.shape[-1]
    shown = image[max(0, -y) : side - y, max(0, -x) : side - x]
    top, left = max(0, y), max(0, x)
    tile[:, top : top + shown.shape[0], left : left + shown.shape[1]] = shown.transpose(2, 0, 1)


def _map_in_threads(function: Callable[[Any], Any], items: Sequence[Any], num_threads: int) -> list:
    if num_threads < 2:
        return list(map(function, items))
    with ThreadPoolExecutor(num_threads) as pool:  # none is kept: its threads would be missing after a fork
        return list(pool.map(function, items))


def _are_apart(images: Sequence[Any]) -> bool:
    """Whether threads may take one image each: none decodes from a file that another image, or its owner, reads."""
    files = [getattr(image, "fp", None) or image for image in images]
    is_ours = all(is_opened_here(image) or not isinstance(image, ImageFile.ImageFile) for image in images)
    return is_ours and len(set(map(id, files))) == len(files)


def _is_turned(image: Image.Image, options: dict) -> bool:
    """Whether an image is turned as its EXIF tag says."""
    turns = options["do_exif_transpose"]
    return is_opened_here(image) if turns is None else turns


# -- Pixels -----------------------------------------------------------------------------------------------------------


def _flatten(images: Any) -> list:
    """Flatten nested lists and (N, ...) arrays of images into one list."""
    if isinstance(images, list | tuple):
        return [flat for image in images for flat in _flatten(image)]
    if isinstance(images, np.ndarray | torch.Tensor) and images.ndim == 4:
        return list(images)
    return [images]


def _flatten_to_rgb(image: Image.Image) -> Image.Image:
    """Convert any PIL mode to RGB: transparency onto white, 16 bits to 8."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float32 if image.mode == "F" else np.int32)
        if isinstance(image.info.get("transparency"), int):  # a 16-bit PNG may name one grey as transparent
            values = np.where(values == image.info["transparency"], 65535, values)
        return _array_to_image(values, None, bits=16)
    if image.mode == "RGB" and "transparency" not in image.info:
        image.load()
        return image
    if image.has_transparency_data:
        rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _array_to_image(array: Any, input_data_format: Any, bits: int = 8) -> Image.Image:
    """Convert a numpy array or torch tensor to an 8-bit PIL image."""
    is_tensor = isinstance(array, torch.Tensor)
    if is_tensor:
        array = array.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()  # numpy lacks bfloat16 and float8
    if not isinstance(array, np.ndarray):
        raise ImageError(
            f"it is a {type(array).__name__} but images are paths, bytes, URLs, PIL images, numpy arrays or torch "
            "tensors. A list of numbers was probably passed: wrap it in np.array."
        )
    array = _channels_last(array, input_data_format, prefer_first=is_tensor)
    pixels = _to_uint8(array, bits)
    if pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    return _flatten_to_rgb(Image.fromarray(np.ascontiguousarray(pixels)))


def _channels_last(array: np.ndarray, input_data_format: Any, prefer_first: bool) -> np.ndarray:
    """View an image as (H, W, C). Where both ends could be channels, tensors are taken as (C, H, W), arrays not."""
    if array.ndim == 2:
        return array[..., None]
    if array.ndim != 3:
        raise ImageError(
            f"it has {array.ndim} dimensions {array.shape} but an image has 2, (height, width), or 3, with channels "
            "first or last. It is probably one value of a batch too deep: index it or squeeze it."
        )
    first, last = array.shape[0] in (1, 3, 4), array.shape[-1] in (1, 3, 4)
    if input_data_format is not None:
        is_first = ChannelDimension(input_data_format) == ChannelDimension.FIRST
        first, last = first and is_first, last and not is_first
    if not first and not last:
        where = "neither end is" if input_data_format is None else f"{input_data_format!r} does not find"
        raise ImageError(
            f"it has the shape {array.shape}, where {where} a channel count of 1, 3 or 4. It is probably a stack of "
            "feature maps or multispectral: pass grey, RGB or RGBA."
        )
    return array.transpose(1, 2, 0) if first and (prefer_first or not last) else array


def _to_uint8(array: np.ndarray, bits: int) -> np.ndarray:
    """Scale values to 0..255. Integers are 8-bit (uint16, or `bits` 16: 16-bit), floats 0..1 or 0..255."""
    if array.dtype == np.uint8 or array.size == 0:
        return array.astype(np.uint8)
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind not in "iuf":
        raise ImageError(
            f"its values are of type {array.dtype} (shape {array.shape}) but must be integers or floats. It was "
            "probably read as text or transformed to frequencies: pass the original pixels."
        )
    low, high = float(array.min()), float(array.max())
    is_float = array.dtype.kind == "f"
    is_16_bit = not is_float and (bits == 16 or (array.dtype.kind, array.dtype.itemsize) == ("u", 2))
    limit, slack = 65535 if is_16_bit else 255, 1e-3 if is_float else 0  # arithmetic leaves floats a hair outside
    if not (low >= -slack and high <= limit + slack):  # also catches NaN
        raise ImageError(
            f"its values run from {low:g} to {high:g} but must be within 0 to {limit}"
            f"{' or 0 to 1' if is_float else ''}, without NaN. It was probably normalised already or is not a "
            "image: pass the original pixels."
        )
    if is_float and 1 + slack < high < 2:
        raise ImageError(
            f"its values run from {low:g} to {high:g}, where 0 to 1 and 0 to 255 cannot be told apart. It was "
            "probably scaled to 0 to 1 by a filter that overshoots: clip it to 1, or pass uint8."
        )
    if is_16_bit:
        return (array.astype(np.float32) / 257).round().astype(np.uint8)
    if is_float:
        array = (array * 255 if high <= 1 + slack else array).clip(0, 255)
    return array.round().astype(np.uint8)


def _explain(error: Exception) -> str:
    """The message of one of our own errors as it is; a decoder's error with what to do about it."""
    if isinstance(error, ImageError):
        return str(error)
    return (
        f"it could not be decoded ({type(error).__name__}: {str(error)[:200]}). Expected a complete image file. It is "
        "probably truncated or corrupted: open it in a viewer, replace it or drop it."
    )


def _copy(value: Any) -> Any:
    """Copy sizes and grids, tuples to lists as JSON gives them back; leave the rest for the checks to refuse."""
    if isinstance(value, list | tuple):
        return [_copy(entry) for entry in value]
    return dict(value) if isinstance(value, dict) else value


def _per_channel(value: Any) -> Any:
    """Spread one number over the channels."""
    return [value] * 3 if isinstance(value, int | float) else _copy(value)


def _refuse_misspelt(kwargs: dict) -> None:
    """Refuse names close to a setting; transformers carries other names along without using them."""
    for name, value in kwargs.items():
        close = difflib.get_close_matches(name, _SETTINGS, n=1, cutoff=0.8)
        if close and name not in Blip3ImageProcessorKwargs.__annotations__:
            raise ValueError(
                f"The image processor was given the unknown setting {name!r} ({value!r}); it would be ignored. It is "
                f"probably misspelt. Did you mean {close[0]!r}?"
            )


expose_in_package(__name__)

__all__ = ["Blip3ImageProcessor"]
