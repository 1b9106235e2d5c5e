"""The error of an image that can never be used, in contrast to one that cannot be read just now."""

# PIL's own limit, beyond which it takes a file for an attack on memory
MAX_PIXELS = 178_956_970


class UnusableImageError(ValueError):
    """An image is missing, damaged or not a picture; `data.on_error: skip` replaces its sample.

    A disk or a network that fails raises something else, so that no good sample is left out.
    """
