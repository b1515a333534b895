"""The camera of a photograph, and where in the room the points of a hand stand before it.

Frames: x right, y down, z forward, in metres. Pixels of places in a picture are pixel-EDGE coordinates (0 to
width). K, as everywhere, projects to pixel-CENTRE coordinates (edge minus 0.5). A crop's camera (scale, tx,
ty) is weak perspective: x_n = scale (x + tx) in [-1,1] of the square crop (x0, y0, x1, y1).

Example::

    import numpy as np
    from camera import crop_to_picture, place_points, pinhole

    points = np.array([[0, 0, 0], [0.05, -0.08, 0.01], [0.02, -0.1, 0.0]])       # about the wrist
    K = pinhole(500.0, (640, 480))
    seen = (points + [0.1, 0.05, 0.6]) @ K.T
    pixels = seen[:, :2] / seen[:, 2:] + 0.5
    assert np.allclose(place_points(points, pixels, K), [0.1, 0.05, 0.6])
    assert np.allclose(crop_to_picture(points, [10, 0, 0], [100, 100, 300, 300])[0], [200, 200])

MIT licence, hands: masked and contrastive pre-training (see LICENSE).
"""

import math
from pathlib import Path

import numpy as np
from PIL import Image

DIAGONAL = math.hypot(36, 24)  # millimetres of 35 mm film
EXIF = 0x8769  # the part of a file's tags that holds
FOCAL_35 = 0xA405  # FocalLengthIn35mmFilm, 0 where it is unknown


def focal_in_exif(path: Path | str) -> float | None:
    """The focal length in pixels that a photograph's own tags tell; None where they do not.

    FocalLengthIn35mmFilm is the focal length that sees the same angle on 35 mm film. CIPA (DCG-001) compares
    the diagonals, whatever the aspect. It holds for whole photographs, of any size, not for cut ones."""
    try:
        with Image.open(path) as image:
            focal = float(image.getexif().get_ifd(EXIF).get(FOCAL_35, 0))
            diagonal = math.hypot(*image.size)
    except Exception:  # Pillow raises a dozen types for damaged tags
        return None
    return focal / DIAGONAL * diagonal if 1 <= focal < 10_000 else None


def pinhole(focal: float, size: tuple[int, int]) -> np.ndarray:
    """K (3,3) of a camera that looks at the middle of its picture (width, height)."""
    width, height = size
    return np.array([[focal, 0, width / 2 - 0.5], [0, focal, height / 2 - 0.5], [0, 0, 1]])


def camera_of(path: Path | str | None, size: tuple[int, int], K: tuple | None = None,
              focal: float | None = None) -> tuple[np.ndarray, str]:
    """K (3,3) of a picture (width, height), and where it is from: "K", "focal", "exif" or "guess".

    K: fx, fy, cx, cy; focal: pixels. Else the tags of the file `path` are asked. The guess is the longer
    side: 53 degrees across it. ValueError where K is none of such a picture."""
    if K:
        fx, fy, cx, cy = K
        if not (0 < fx < 1e6 and 0 < fy < 1e6 and 0 <= cx < size[0] and 0 <= cy < size[1]):
            raise ValueError(f"--K {fx:g} {fy:g} {cx:g} {cy:g} looks beside the picture of {size[0]} x "
                             f"{size[1]} pixels: give fx fy cx cy for pictures of this size")
        return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]]), "K"
    if focal:
        return pinhole(focal, size), "focal"
    found = focal_in_exif(path) if path else None
    return (pinhole(found, size), "exif") if found else (pinhole(max(size), size), "guess")


def crop_to_picture(points: np.ndarray, camera, crop) -> np.ndarray:
    """Pixels (N,2) of the picture where points (N,3) stand by the camera (3,) of the square crop (4,)."""
    scale, tx, ty = camera
    x0, y0, x1, _ = crop
    return (scale * (points[:, :2] + [tx, ty]) + 1) / 2 * (x1 - x0) + [x0, y0]


def fit_weak_perspective(points: np.ndarray, pixels: np.ndarray) -> tuple[float, np.ndarray]:
    """Scale and shift (2,): pixels (N,2) are nearest to scale points[:, :2] + shift in least squares.

    points: (N,3). Where all stand at one place, the scale is 0."""
    flat = points[:, :2] - points[:, :2].mean(0)
    middle = pixels.mean(0)
    scale = ((pixels - middle) * flat).sum() / max((flat ** 2).sum(), 1e-12)
    return scale, middle - scale * points[:, :2].mean(0)


def place_points(points: np.ndarray, pixels: np.ndarray, K: np.ndarray) -> np.ndarray:
    """The translation (3,) of points (N,3) that brings them best to their pixels (N,2) through K.

    Ours: fx (x + tx) = (u - cx) (z + tz) for each point, and the same for y, are linear in the translation;
    least squares, weighted by nothing. A crop's scale belongs to the depth of the hand's middle. Taken for
    that of its wrist, it would place a hand that points at the camera centimetres too far away."""
    u_v = pixels - 0.5 - K[:2, 2]  # (N, 2)
    focal = K[[0, 1], [0, 1]]
    rows = np.zeros((len(points), 2, 3))
    rows[:, 0, 0], rows[:, 1, 1] = focal
    rows[:, :, 2] = -u_v
    wanted = u_v * points[:, 2:] - focal * points[:, :2]  # (N, 2)
    return np.linalg.lstsq(rows.reshape(-1, 3), wanted.ravel(), rcond=None)[0]
