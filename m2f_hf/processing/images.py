"""Read images of any kind, the only place that does, and resize and pad them; built on Pillow and NumPy."""

import ssl
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.image_utils import ChannelDimension, PILImageResampling, SizeDict


try:
    from certifi import where as find_certificates
except ImportError:
    find_certificates = None  # type: ignore[assignment]

Size = tuple[int, int]

ADDRESSES = ("http://", "https://", "data:image/")
# Of an image by its address: seconds without an answer, and bytes at most.
TIMEOUT = 30.0
MAX_DOWNLOAD = 2**28


# --- reading ---


def read_image(
    image: Any, data_format: str | ChannelDimension | None = None, timeout: float | None = None
) -> np.ndarray:
    """Read an image of any kind as (3, H, W) RGB: uint8, or float32 in the range it came in.

    Args:
        image: path (str or Path), http(s) or data: address, Pillow image of any mode, or array or tensor (H, W),
            (H, W, C) or (C, H, W) with 1, 3 or 4 channels. Files and Pillow images are turned upright (EXIF).
        data_format: "channels_first" or "channels_last"; by default the shape tells, and where it fits both, arrays
            are (H, W, C) and tensors (C, H, W).
        timeout: seconds to wait for an address; None: 30.

    Raises:
        FileNotFoundError: a path without a file.
        ValueError: what is not an image; each says what to do.
    """
    if isinstance(image, str) and image.startswith(ADDRESSES):
        image = _fetch_image(image, TIMEOUT if timeout is None else timeout)
    elif isinstance(image, str | Path):
        image = open_image(image)
    is_torch = isinstance(image, torch.Tensor)
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        array = (image.float() if image.is_floating_point() else image).numpy()
    elif isinstance(image, Image.Image):
        array = np.asarray(_to_rgb(image))
    elif isinstance(image, np.ndarray):
        array = image
    else:
        raise ValueError(
            f"{type(image).__name__} is not an image: pass a path, an address, a Pillow image, an array or a tensor"
        )
    data_format = None if data_format is None else ChannelDimension(data_format).value
    return _to_known_range(_to_channels_first(array, is_torch, data_format))


def read_rgb(image: Any) -> Image.Image:
    """Read an image of any kind, as `read_image` does, as an upright 8-bit RGB Pillow image.

    Raises:
        FileNotFoundError: a path without a file.
        ValueError: what is not an image, fractions outside of 0 to 255.
    """
    if isinstance(image, Image.Image):
        image = _to_rgb(image)
        if isinstance(image, Image.Image):  # without an array, a JPEG is read in two thirds of the time
            return image
    return to_pillow(read_image(image))


def to_pillow(image: np.ndarray) -> Image.Image:
    """Turn (3, H, W) of `read_image` into an 8-bit RGB Pillow image.

    Raises:
        ValueError: fractions outside of 0 to 255.
    """
    return Image.fromarray(np.ascontiguousarray(np.moveaxis(_to_8_bit(image), 0, -1)))


def list_of_images(images: Any) -> list[Any]:
    """Return a list of images from one image, a list, or an array of four dimensions.

    Raises:
        ValueError: an empty list.
    """
    if isinstance(images, list | tuple) or (isinstance(images, np.ndarray | torch.Tensor) and images.ndim == 4):
        images = list(images)
        if not images:
            raise ValueError("there are no images: the list is empty")
        return images
    return [images]


def open_image(path: str | Path) -> Image.Image:
    """Open and decode an image file; its pixels stay as stored.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: what is there is no image that Pillow can decode to the end.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no image file {path}")
    try:
        return _decode(path)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{path} cannot be read as an image ({error}): the file is damaged, incomplete or of a format that Pillow "
            "does not know; save it again as PNG or JPEG"
        ) from error


def _fetch_image(address: str, timeout: float) -> Image.Image:
    try:
        context = ssl.create_default_context()
        if find_certificates is not None:  # some Pythons come without certificates
            context.load_verify_locations(find_certificates())
        # Some servers refuse Python's own name.
        request = Request(address, headers={"User-Agent": "m2f_hf"})
        with urlopen(request, timeout=timeout, context=context) as response:
            content = response.read(MAX_DOWNLOAD + 1)
        if len(content) > MAX_DOWNLOAD:
            raise ValueError(f"it is larger than {MAX_DOWNLOAD >> 20} MiB")
        return _decode(BytesIO(content))
    except Exception as error:  # of the network, of its client, of Pillow
        raise ValueError(
            f"no image could be fetched from {address[:100]} ({error}): download it and pass its path"
        ) from error


def _decode(file: Any) -> Image.Image:
    with Image.open(file) as image:
        image.load()
        return image


def _to_rgb(image: Image.Image) -> Image.Image | np.ndarray:
    """Turn a Pillow image upright: RGB, or (H, W) of the mode's own type where that is wider than 8 bits."""
    is_png = image.format == "PNG"  # a copy no longer knows
    image = ImageOps.exif_transpose(image)
    if image.mode == "I" and is_png:
        return np.asarray(image).astype(np.uint16)  # older versions of Pillow read 16 bits of grey as 32
    if image.mode.startswith("I") or image.mode == "F":
        return np.asarray(image)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB Pillow warns of the transparency that is lost
    return image.convert("RGB")


def _to_channels_first(array: np.ndarray, prefers_channels_first: bool, data_format: str | None) -> np.ndarray:
    """Convert (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels to (3, H, W); alpha is dropped, grey repeated."""
    if array.ndim == 2:
        array = array[None]
    elif array.ndim == 3:
        fits = {"channels_first": array.shape[0] in (1, 3, 4), "channels_last": array.shape[2] in (1, 3, 4)}
        if data_format is None:
            order = list(fits) if prefers_channels_first else list(fits)[::-1]
            data_format = next((candidate for candidate in order if fits[candidate]), None)
        if data_format is None or not fits[data_format]:
            raise ValueError(f"an image of shape {array.shape} has no axis of 1, 3 or 4 channels")
        array = array if data_format == "channels_first" else np.moveaxis(array, -1, 0)
    else:
        raise ValueError(f"an image has 2 or 3 dimensions, not {array.ndim} (shape {array.shape})")
    if 0 in array.shape:
        raise ValueError(f"an image of shape {array.shape} has no pixels")
    return np.repeat(array, 3, axis=0) if array.shape[0] == 1 else array[:3]


def _to_known_range(array: np.ndarray) -> np.ndarray:
    """Convert whole numbers to uint8 of 0 to 255, and fractions to float32 in their own range.

    uint16 is 16 bits however dark it is; other whole numbers are 8 bits unless any is above 255.
    """
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if array.dtype.kind in "iu":
        low, high = int(array.min()), int(array.max())
        if low < 0 or high > 65535:
            raise ValueError(f"pixels from {low} to {high}: whole numbers must be 0 to 255, or 0 to 65535 for 16 bits")
        is_16_bit = (array.dtype.kind, array.dtype.itemsize) == ("u", 2) or high > 255
        return np.rint(array / 257).astype(np.uint8) if is_16_bit else array.astype(np.uint8)
    if array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise ValueError("the image has NaN or infinite pixels; replace them, for example by np.nan_to_num")
        return array.astype(np.float32)
    raise ValueError(f"an image of {array.dtype} has no pixel values: pass uint8, another whole-number type or a float")


def scale_to_255(image: np.ndarray) -> int:
    """Return the factor that brings an image to 0 to 255: 255 for fractions from 0 to 1, otherwise 1.

    Raises:
        ValueError: fractions outside of 0 to 255.
    """
    if image.dtype == np.uint8:
        return 1
    low, high, tolerance = float(image.min()), float(image.max()), 1e-3
    if low < -tolerance or high > 255 + tolerance:
        raise ValueError(
            f"pixels from {low:g} to {high:g}: fractions must be 0 to 1 or 0 to 255. Pass the image before it is "
            "normalised; or, to have it only padded, set do_resize, do_rescale and do_normalize to False"
        )
    return 255 if high <= 1 + tolerance else 1


def get_resized_size(image_size: Size, size: SizeDict) -> Size:
    """Return height and width after resizing, rounded half up.

    With `shortest_edge` the aspect ratio is kept: the shorter side gets that length, or less where the longer one would
    exceed `longest_edge` (optional). `height` and `width` stretch.

    Raises:
        ValueError: for other keys, and where the shorter side would be left without a pixel.
    """
    if size.height and size.width:
        return size.height, size.width
    if not size.shortest_edge:
        raise ValueError(f"size needs `shortest_edge` (and `longest_edge`), or `height` and `width`; got {dict(size)}")
    height, width = image_size
    scale = size.shortest_edge / min(height, width)
    # In two steps, as the original does: the rounding of the products decides where a side ends in one half.
    new_height, new_width = (
        (size.shortest_edge, scale * width) if height < width else (scale * height, size.shortest_edge)
    )
    longest = max(new_height, new_width)
    if size.longest_edge and longest > size.longest_edge:
        shrink = size.longest_edge / longest
        new_height, new_width = new_height * shrink, new_width * shrink
    rounded = int(new_height + 0.5), int(new_width + 0.5)
    if min(rounded) < 1:
        raise ValueError(
            f"an image of {height}x{width} pixels is too elongated: at a longest edge of {size.longest_edge} the other "
            "would have none left. Crop it, or give a larger `longest_edge` in `size`"
        )
    return rounded


def resize_image(image: np.ndarray, size: SizeDict, resample: PILImageResampling | None = None) -> np.ndarray:
    """Resize (3, H, W) to (3, new H, new W) by Pillow on 8 bits, to `get_resized_size`; range and dtype stay."""
    height, width = get_resized_size((image.shape[-2], image.shape[-1]), size)
    resized = to_pillow(image).resize(
        (width, height), Image.Resampling.BILINEAR if resample is None else Image.Resampling(int(resample))
    )
    array = np.moveaxis(np.asarray(resized), -1, 0)
    return array if image.dtype == np.uint8 else array.astype(np.float32) / scale_to_255(image)


def _to_8_bit(image: np.ndarray) -> np.ndarray:
    if image.dtype == np.uint8:
        return image
    return np.rint(image * scale_to_255(image)).clip(0, 255).astype(np.uint8)


def pad_to(array: np.ndarray, size: Size | None) -> np.ndarray:
    """Pad (..., H, W) to (..., *size) with zeros (False) at the bottom and right; None leaves it as it is.

    Raises:
        ValueError: the array is larger.
    """
    if size is None or array.shape[-2:] == tuple(size):
        return array
    bottom, right = size[0] - array.shape[-2], size[1] - array.shape[-1]
    if bottom < 0 or right < 0:
        raise ValueError(
            f"an image of {array.shape[-2]}x{array.shape[-1]} does not fit into {size[0]}x{size[1]}: give a larger "
            "`pad_size`, or a smaller `size`"
        )
    widths = [(0, 0)] * (array.ndim - 2) + [(0, bottom), (0, right)]
    return np.pad(array, widths)
