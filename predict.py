"""Photographs and videos -> meshes of their hands.

Without --boxes and --detector a photograph is one hand, which fills it; --refine crops again around the
mesh. --boxes is a CSV with the header image,x0,y0,x1,y1[,side]: tight boxes in pixels of any number of hands,
`image` as on the command line or relative to the folder given there (for a photograph its bare name).
--detector mediapipe finds hands and sides by itself. Left hands are mirrored for the network and back.

A file in --out that this command did not write is never overwritten. Its own results and indices below a
folder are no photographs.

A photograph leaves NAME.obj, NAME.npz and NAME.png (the mesh laid over it) for each hand, and NAME_all.png
where there are several. NAME.npz holds, in metres, in the photograph's camera frame (x right, y down, z
forward):

    vertices (778,3), joints (21,3)     relative to the wrist
    translation (3,)                    the wrist's place, if K and the hand's size are true
    rotmats (16,3,3), betas (10,)       of the RIGHT hand model; a left hand's are those of its mirror image
    hand_scale                          what --hand-length multiplied the model by, else 1
    camera (3,)                         scale, tx, ty: x_n = scale (x + tx) in [-1,1] of the square `crop`
    crop (4,)                           x0, y0, x1, y1 in pixels
    side                                "right" or "left"
    K (3,3), focal, focal_source        pixels, and where they are from: K, focal, exif or guess

A video, or a folder of frames with --video, leaves ONE NAME.npz, which has a row for each hand in each frame,
and NAME/ with the overlays. The same names hold (M,...) there, and besides:

    frame (M,), time (M,)               number of the frame from 0; seconds
    track (M,)                          number of the hand
    sure (M,)                           False where the network's estimates disagree
"""

import math
import os
import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from camera import camera_of, crop_to_picture, place_points
from data import (
    CONTEXT, OVERLAY, canvas_size, counts_text, crop_canvas, cut_canvas, image_size, is_overlay,
    list_images, match_boxes, mirror, name_key, read_boxes, read_image, square, whole_box,
)
from draw import overlay
from mano import Mano, hand_fingerprint, joints_from_vertices, read_mano, weak_perspective
from model import load_mesh
from runtime import add_device_flags, check_ranges, parser, run, setup
from saving import check_writable, load_checkpoint, staged_folder
from synthetic_hand import synthetic_mano
from tracking import Tracks, box_around, is_gone, jitter, smooth, smooth_rotations
from video import (
    OVERLAYS, VIDEO_SUFFIXES, OverlayWriter, frame_rate, hand_box, list_videos, mediapipe_detector,
    overlay_names, read_frames,
)
from views import upright_views

WEIGHTS = Path(__file__).resolve().parent / "weights" / "hand.pt"
OBJ_MARK = "# hand by predict.py"  # first line of its .obj
MOST_DRAWN = 25e6  # pixels of an overlay: a larger photograph is shown at a half, a third, ... of its size
KEYS = {"vertices", "joints", "rotmats", "betas", "camera", "crop", "side", "translation", "focal", "K",
        "focal_source", "hand_scale"}  # of NAME.npz,
ROW_KEYS = KEYS | {"frame", "time", "track", "sure"}  # and of a video's
ESTIMATED = ("rotmats", "betas", "vertices", "joints", "camera", "doubt")  # by the network
DETECTED = 1600  # pixels a side: a JPEG that has more than twice as many is decoded smaller for the detector


# ------------------------------------------------------------------------------------------ what is asked for
def find_images(paths, out):
    """[(photograph, folder it is named in)] of the photographs and folders on the command line, each once.

    What lies in `out`, indices and results below a folder are left out; what was not taken is printed."""
    images = []
    for path in paths:
        left_out = Counter()
        below = list_images(path, skip=out, left_out=left_out) if path.is_dir() else [path]
        folder = path if path.is_dir() else path.parent
        if path.is_dir() and not below:
            raise ValueError(f"{path}: no image in this folder ({counts_text(left_out) or 'it is empty'})")
        if counts_text(left_out):
            print(f"{path}: not taken: {counts_text(left_out)}")
        images += [(image, folder) for image in below]
    return list({os.path.abspath(image): (image, folder) for image, folder in images}.values())


def clip_name(path):
    """What the results of a video are called: as a file without its suffix, or as a folder, also where that
    is written as . or .."""
    whole = Path(os.path.abspath(path))
    return (whole.name or "frames") if path.is_dir() else whole.stem


class Names:
    """Gives every result a name of its own, also where a file system takes A.png for a.png."""

    def __init__(self):
        self.taken = set()

    def free(self, stem, *ends):
        """`stem`, or stem_2, stem_3, ...; no other result will have this name, with one of `ends` or none."""
        number = 1
        name = stem
        while any(f"{name}{end}".casefold() in self.taken for end in ("", *ends)):
            number += 1
            name = f"{stem}_{number}"
        self.taken |= {f"{name}{end}".casefold() for end in ("", *ends)}
        return name


def find_hands(images, boxes_path, side, detect=None, names=None, is_all=True):
    """[(path, box, side, points, name)] of every hand asked for, those of a photograph together; box None
    without a file of boxes and a detector, points as detect_in gives them, or None. Names are unique.

    images: of find_images. side: where nothing else says it. Photographs without a hand are left out, which
    is printed, as are names in the file without a photograph where `is_all`, so that there is no video.
    ValueError where none has a hand.
    """
    names = names or Names()
    asked = [[(None, side, None)]] * len(images)
    without_image = []
    source, what = (f"--boxes {boxes_path}", "line") if boxes_path else ("--detector", "hand")
    if boxes_path:
        boxes, without_image = match_boxes(read_boxes(boxes_path), images, boxes_path)
        asked = [[(*hand, None) for hand in found] for found in boxes]
    elif detect:
        asked = [detect_in_file(path, detect) for path, _ in tqdm(images, unit="photograph", desc="detector")]
    hands = []
    for (path, _), found in zip(images, asked, strict=True):
        for number, (box, box_side, points) in enumerate(found):
            ends = ("_all",) if number == 0 and len(found) > 1 else ()
            hands.append((path, box, box_side or side, points, names.free(path.stem, *ends)))
    without_hand = [path for (path, _), found in zip(images, asked, strict=True) if not found]
    if not hands:
        first = f"; the first in the file is {next(iter(without_image), 'missing')}" if boxes_path else ""
        raise ValueError(f"{source}: no {what} for any of the {len(images)} photographs (the first is "
                         f"{images[0][0]}{first})")
    for kind, which in ((f"photographs without a {what}, left out", without_hand),
                        ("names without a photograph", without_image if is_all else ())):
        if which:
            print(f"{source}: {kind}: {len(which)} (the first is {which[0]})")
    return hands


def detect_in_file(path, detect):
    """detect_in of a photograph. One that cannot be read has a hand, whose reading will say what is wrong."""
    try:
        image, scale = read_image(path, DETECTED)
    except (ValueError, OSError):
        return [(None, None, None)]
    return detect_in(image, detect, scale)


def detect_in(image, detect, scale=1.0):
    """[(box, side, points)] that a detector sees in a picture, which is `scale` times as large as its file.
    Boxes and points in pixels of the file: points (21,3) x, y and the detector's certainty of the hand."""
    hands = []
    for hand in detect(image):
        places = (hand["keypoints"] + 0.5) / scale  # pixel edges
        points = np.column_stack([places, hand["score"]])
        points[0, 2] /= 2  # MediaPipe's wrist lies beside the hand model's: see fit_hands.py
        hands.append((hand_box(hand) / scale, hand["side"], points))
    return hands


def refuse_others_files(hands, videos, folder):
    """ValueError where a result would replace a file that this command did not write, or an input.

    hands: of find_hands; videos: [(path, name)]."""
    inputs = {os.path.realpath(path) for path, *_ in hands + videos}
    several = Counter(path for path, *_ in hands)
    results = {f"{name}{end}" for *_, name in hands for end in (".obj", ".npz", ".png")}
    results |= {f"{name}_all.png" for path, *_, name in hands if several[path] > 1}
    results |= {f"{name}{end}" for _, name in videos for end in ("", ".npz")}
    for file in sorted(folder / name for name in results):
        # Some file systems take A.PNG for A.png: they say what is there, no list of names does.
        if os.path.lexists(file) and (os.path.realpath(file) in inputs or not is_result(file)):
            raise ValueError(f"--out {folder}: {file.name} is there already and was not written by this "
                             "version of predict.py: choose another folder")


def is_result(path):
    """True for a file or a folder of overlays that this command wrote."""
    try:
        if path.is_dir():
            return set(os.listdir(path)) <= {OVERLAYS, *overlay_names(path)}
        if path.suffix == ".obj":
            with open(path, errors="replace") as file:
                return file.read(len(OBJ_MARK)) == OBJ_MARK
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return set(file.files) in (KEYS, ROW_KEYS)
        return is_overlay(path)
    except Exception:  # zipfile and numpy raise a dozen types for what is no .npz
        return False


# ------------------------------------------------------------------------------------------------- prediction
@dataclass
class Look:
    """One hand in a picture as the network sees it."""

    source: Path | Image.Image  # a photograph's file, or a frame
    size: tuple  # width and height of the picture
    side: str
    points: np.ndarray | None  # (21,3) of a detector: pixels of the picture, certainty
    crop: np.ndarray  # (4,) the square that the network sees, pixels
    canvas: np.ndarray  # (3,S,S) u8, mirrored for a left hand

    def points_in_view(self):
        """points in [-1,1] of the view; (21,3) zeros where there are none."""
        if self.points is None:
            return np.zeros((21, 3), np.float32)
        x0, y0, x1, _ = self.crop
        half = (x1 - x0) / 2
        places = (self.points - [x0 + half, y0 + half, 0]) / [half, half, 1]
        return np.float32(places * [-1 if self.side == "left" else 1, 1, 1])


class Network:
    """A mesh network with what it needs: the side of its views over the box, its hand model, a device."""

    def __init__(self, path, mano, runtime):
        if path == WEIGHTS and not path.exists():
            raise ValueError(f"{path} is missing: give --checkpoint RUN/last.pt of a network that "
                             "finetune_mesh.py trained (recipes/laptop.sh trains one in minutes)")
        state = load_checkpoint(path, "mesh")
        self.arrays = read_mano(mano) if mano else synthetic_mano()
        if state.get("hand") != hand_fingerprint(self.arrays):
            raise ValueError(f"{path} was trained with another hand model than {mano or 'the synthetic hand'}"
                             ": pass its file with --mano")
        self.net = load_mesh(state, Mano(self.arrays)).to(runtime.device)
        self.hand = self.net.head.hand
        self.box_scale = state["box_scale"]
        self.runtime = runtime
        self.size = self.net.encoder.config["image_size"]
        self.faces = self.hand.faces.cpu().numpy()

    def look(self, source, size, box, side, points=None):
        """Cuts the Look at a hand. box None: the picture is its crop. ValueError: the box lies beside it."""
        box = whole_box(size, self.box_scale) if box is None else box
        if not is_in_picture(box, size):
            raise ValueError(f"the box {' '.join(f'{place:g}' for place in box)} lies outside of it, or is "
                             "far larger")
        if isinstance(source, Path):
            canvas, _ = cut_canvas(source, box, CONTEXT, canvas_size(self.size, self.box_scale))
        else:
            canvas, _ = crop_canvas(source, *square(box, CONTEXT), canvas_size(self.size, self.box_scale))
        if side == "left":
            canvas = canvas[:, ::-1]
        x, y, length = square(box, self.box_scale)
        crop = np.array([x, y, x, y]) + np.array([-1, -1, 1, 1]) * length / 2
        return Look(source, size, side, points, crop, canvas.transpose(2, 0, 1))

    @torch.inference_mode()
    def _estimate(self, looks):
        """What the network sees of each Look: rotmats, betas; vertices, joints, camera of the picture; doubt:
        mean distance of the joints in the last two estimates, as a share of the box's longer side."""
        canvases = torch.from_numpy(np.stack([look.canvas for look in looks]))
        views = upright_views(canvases.to(self.runtime.device), self.box_scale / CONTEXT, self.size)
        seen = None
        if any(look.points is not None for look in looks):
            seen = torch.from_numpy(np.stack([look.points_in_view() for look in looks])).to(views.device)
        with self.runtime.autocast():
            *before, last = self.net(views, seen)
        points = [weak_perspective(each["joints"], each["camera"]) for each in (*before, last)]
        side = (points[-1].amax(1) - points[-1].amin(1)).amax(1)  # (B,), of points (B,21,2)
        *_, before_last, moved = [0 * side, 0 * side,
                                  *((new - old).norm(dim=2).mean(1) for old, new in pairwise(points))]
        # A hand without joint maps that no detector saw has nothing to settle on.
        last["doubt"] = torch.where(moved > 0, moved, before_last) / side
        last["joints"] = joints_from_vertices(last["vertices"], self.arrays)
        last = {name: last[name].float().cpu().numpy() for name in ESTIMATED}
        return [_as_seen({name: value[i] for name, value in last.items()}, look.side)
                for i, look in enumerate(looks)]

    def estimate(self, looks, rounds=0):
        """[(Look, estimate)] after cropping `rounds` times around the mesh just seen. Where that leads out
        of the crop or the picture, the crop stays. estimate: see _estimate."""
        for _ in range(rounds):
            again = []
            for look, estimate in zip(looks, self._estimate(looks), strict=True):
                box = box_of(look, estimate)
                if not is_gone(box, None, look.crop, look.size):
                    look = self.look(look.source, look.size, box, look.side, look.points)
                again.append(look)
            looks = again
        return list(zip(looks, self._estimate(looks), strict=True))

    @torch.inference_mode()
    def hands(self, rotmats, betas, sides):
        """vertices (M,778,3) and joints (M,21,3) about the wrist, as the picture shows them, of right hands'
        rotmats (M,16,3,3) and betas (M,10). sides (M,): of the hands in the picture."""
        rotmats, betas = (torch.from_numpy(np.float32(each)).to(self.runtime.device)
                          for each in (rotmats, betas))
        vertices, joints = self.hand(rotmats, betas)
        vertices = vertices - joints[:, :1]
        points = {"vertices": vertices, "joints": joints_from_vertices(vertices, self.arrays)}
        points = {name: value.cpu().numpy() for name, value in points.items()}
        is_left = (sides == "left")[:, None, None]
        return {name: np.where(is_left, mirror(name, value), value) for name, value in points.items()}

    @torch.inference_mode()
    def length(self, betas):
        """Metres from the wrist to the tip of the middle finger of the flat hand of betas (10,)."""
        flat = torch.eye(3, device=self.runtime.device).expand(1, 16, 3, 3)
        _, joints = self.hand(flat, torch.from_numpy(np.float32([betas])).to(flat.device))
        return float((joints[0, 12] - joints[0, 0]).norm())


def is_in_picture(box, size):
    """False for a box (4,) that does not touch a picture (width, height), or is more than twice as large."""
    x0, y0, x1, y1 = box
    touches = x0 < size[0] and y0 < size[1] and x1 > 0 and y1 > 0
    return touches and max(x1 - x0, y1 - y0) <= 2 * max(size)


def _as_seen(estimate, side):
    """The estimate of a view as the hand lies in the picture: that of a left hand was mirrored."""
    if side == "right":
        return estimate
    return {name: mirror(name, value) for name, value in estimate.items()}


def box_of(look, estimate):
    """The box (4,) around the 21 joints in the picture."""
    return box_around(crop_to_picture(estimate["joints"], estimate["camera"], look.crop))


def true_size(length, millimetres):
    """By what a hand of this length, in metres, is too small; 1 where the true length is not given."""
    return millimetres / 1000 / length if millimetres else 1.0


def place_hand(estimate, crop, side, K, source, factor=1.0):
    """The hand as NAME.npz holds it. K (3,3) of its picture and its source; factor: true by model's size."""
    vertices, joints = (estimate[name] * np.float32(factor) for name in ("vertices", "joints"))
    camera = estimate["camera"] * np.float32([1 / factor, factor, factor])
    translation = place_points(joints, crop_to_picture(joints, camera, crop), K)
    return {"vertices": vertices, "joints": joints, "rotmats": estimate["rotmats"],
            "betas": estimate["betas"], "camera": camera, "crop": np.float32(crop),
            "side": np.array(side), "translation": np.float32(translation), "K": np.float32(K),
            "focal": np.float32(math.sqrt(K[0, 0] * K[1, 1])), "focal_source": np.array(source),
            "hand_scale": np.float32(factor)}


# ------------------------------------------------------------------------------------------ drawing, writing
def read_photograph(path):
    """A photograph (H,W,3) u8 for drawing, and how many times smaller it is than its file."""
    image, _ = read_image(path)
    factor = math.ceil(math.sqrt(image.width * image.height / MOST_DRAWN))
    return np.asarray(image.reduce(factor)), factor


def draw_hands(image, factor, hands, faces):
    """The meshes over the picture, which is `factor` times smaller than its file, by the crops' weak
    perspective; the nearest last."""
    for hand in sorted(hands, key=lambda hand: -hand["translation"][2]):
        points = crop_to_picture(hand["vertices"], hand["camera"], hand["crop"]) / factor
        image = overlay(image, np.concatenate([points, hand["vertices"][:, 2:]], axis=1), faces)
    return image


def write_hand(folder, name, hand, photograph, faces):
    """NAME.obj, NAME.npz and NAME.png in `folder`; the three appear together."""
    with staged_folder(folder) as part:
        seen_from_outside = faces if hand["side"] == "right" else faces[:, ::-1]  # of a mirrored hand
        write_obj(part / f"{name}.obj", hand["vertices"], seen_from_outside)
        np.savez(part / f"{name}.npz", **hand)
        write_overlay(part / f"{name}.png", draw_hands(*photograph, [hand], faces))


def write_overlay(path, drawn):
    """A picture (H,W,3) with the mark of this command."""
    mark = PngInfo()
    mark.add_text("Software", OVERLAY)
    Image.fromarray(drawn).save(path, pnginfo=mark, compress_level=1)


def write_obj(path, vertices, faces):
    """Wavefront OBJ in metres; y and z point up and towards the viewer there, so both change sign."""
    points = [f"v {x:.6f} {-y:.6f} {-z:.6f}" for x, y, z in vertices]
    triangles = [f"f {a} {b} {c}" for a, b, c in faces + 1]
    path.write_text("\n".join([OBJ_MARK, *points, *triangles]) + "\n")


# ------------------------------------------------------------------------------------------------ photographs
def predicted(hands, network, args, failures):
    """Yields (path, name, hand as it is stored) of the hands of find_hands; appends a text to `failures` for
    each that cannot be seen."""
    bar = tqdm(total=len(hands), unit="hand")
    for start in range(0, len(hands), args.batch_size):
        some_hands = hands[start:start + args.batch_size]
        looks, owners = [], []
        for path, box, side, points, name in some_hands:
            try:
                size = image_size(path)
                camera = camera_of(path, size, args.K, args.focal)
                looks.append(network.look(path, size, box, side, points))
                owners.append((path, name, camera))
            except (ValueError, OSError) as error:
                failures.append(_named(error, path))
        seen = network.estimate(looks, args.refine) if looks else []
        for (path, name, camera), (look, estimate) in zip(owners, seen, strict=True):
            factor = true_size(network.length(estimate["betas"]), args.hand_length)
            yield path, name, place_hand(estimate, look.crop, look.side, *camera, factor)
        bar.update(len(some_hands))
    bar.close()


def predict_photographs(hands, network, args):
    """Writes the results of the hands of find_hands; returns a text for each that could not be predicted."""
    failures = []
    sources = Counter()
    first = {path: name for path, *_, name in reversed(hands)}  # the picture of all hands is called as it
    for path, group in groupby(predicted(hands, network, args, failures), lambda each: each[0]):
        try:
            photograph = read_photograph(path)
        except (ValueError, OSError) as error:
            failures += [_named(error, path) for _ in group]
            continue
        drawn = {}
        for _, name, hand in group:
            write_hand(args.out, name, hand, photograph, network.faces)
            sources[str(hand["focal_source"])] += 1
            drawn[name] = hand
        if len(drawn) > 1:
            with staged_folder(args.out) as part:
                all_hands = draw_hands(*photograph, drawn.values(), network.faces)
                write_overlay(part / f"{first[path]}_all.png", all_hands)
        del photograph  # a large one takes hundreds of megabytes
    if sources:
        found = ", ".join(f"{source} ({count})" for source, count in sources.items())
        print(f"{args.out}: {sum(sources.values())} hands, each as .obj, .npz and .png; focal length by "
              f"{found}")
    return failures


# ----------------------------------------------------------------------------------------------------- videos
def find_clips(paths, out):
    """[(video or folder of frames, folder it is named in)] of those on the command line and below, each once.

    paths: video files and, with --video, folders. `out` is left out."""
    clips = []
    for path in paths:
        below = list_videos(path, out) if path.is_dir() else [path]
        clips += [(clip, path.parent if clip == path else path) for clip in below]
    return list({os.path.abspath(clip): (clip, folder) for clip, folder in clips}.values())


def read_frame_boxes(path, clips, is_all):
    """[{frame: [(box, side), ...]}] of the --boxes of each clip of find_clips.

    A frame is called CLIP/FRAME, with the clip as on the command line or relative to the folder given there;
    FRAME alone where one clip is all that there is. is_all: there is no photograph; names that no clip has
    are printed then. ValueError names one that several clips have."""
    of_clips = {}
    for name, hands in read_boxes(path).items():
        clip, _, frame = name_key(name).rpartition("/")
        of_clips.setdefault(clip, []).append((frame, hands))
    bare = of_clips.pop("", []) if is_all and len(clips) == 1 else []
    found, without_clip = match_boxes(of_clips, clips, path)
    if is_all and without_clip:
        names = [f"{clip}/{frame}" if clip else frame for clip in without_clip for frame, _ in of_clips[clip]]
        print(f"--boxes {path}: names without a video: {len(names)} (the first is {names[0]})")
    boxes = [{} for _ in clips]
    for of_frames, frames in zip(boxes, found, strict=True):
        for frame, hands in bare + frames:
            of_frames.setdefault(frame, []).extend(hands)
    return boxes


def finder_of(boxes, args, detect, box_scale):
    """A function (frame's name, frame) -> [(box, side)], as --detector or --boxes know it, of a detector
    with points; None for frames that --boxes do not name. Without both a hand fills the frame.

    boxes: of read_frame_boxes, or None; those that were asked for are taken out."""
    if detect:
        return lambda name, frame: detect_in(frame, detect)
    if boxes is None:
        return lambda name, frame: [(whole_box(frame.size, box_scale), args.side)]

    def find(name, frame):
        hands = boxes.pop(name_key(name), None)
        return hands and [(box, side or args.side) for box, side in hands]

    return find


def look_at(network, frame, refine, tracks):
    """What Tracks.step asks for: the box of the mesh of each track, its crop, the network's doubt, and with
    them the Look and the estimate."""
    looks = [network.look(frame, frame.size, track.box, track.side, track.points) for track in tracks]
    rounds = refine if any(track.is_new for track in tracks) else 0
    return [(box_of(look, estimate), look.crop, estimate["doubt"], (look, estimate))
            for look, estimate in network.estimate(looks, rounds)]


def frames_of(path):
    return read_frames(path, read_image=lambda file: read_image(file)[0])


def follow_hands(path, network, find, rate, args):
    """A row (dict) for each hand in each frame of a video: what the network sees of it, and where. Besides,
    how many frames were read, the names of those that could not be, and of those with a box beside them."""
    tracks = Tracks(asks_often=bool(args.boxes or args.detector))
    rows, unread, beside = [], [], []
    count = 0

    def find_inside(name, frame):
        hands = find(name, frame)
        inside = hands and [hand for hand in hands if is_in_picture(hand[0], frame.size)]
        if inside != hands:
            beside.append(name)
        return inside

    for number, (name, frame) in enumerate(tqdm(frames_of(path), unit="frame", desc=path.name)):
        if frame is None:
            unread.append(name)
            continue
        count += 1
        K, source = camera_of(None, frame.size, args.K, args.focal)
        seen = tracks.step(frame.size, partial(look_at, network, frame, args.refine),
                           partial(find_inside, name, frame))
        for track, (look, estimate) in seen:
            estimate = {key: estimate[key] for key in ("rotmats", "betas", "camera")}
            rows.append(estimate | {
                "frame": number, "time": number / rate, "track": track.number, "part": track.part,
                "sure": track.doubted == 0, "side": look.side, "crop": look.crop, "K": K, "source": source,
                "length": network.length(estimate["betas"])})
    return rows, count, unread, beside


def as_table(rows):
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def groups(*columns):
    """The rows of each combination of values in columns (M,), as arrays of their numbers."""
    _, group = np.unique(np.stack(columns, 1), axis=0, return_inverse=True)
    return [np.flatnonzero(group.ravel() == each) for each in range(group.max() + 1)]


def hold_shape(seen, network):
    """The table of follow_hands with one shape for each side of a hand, the mean of its estimates."""
    betas, length, camera = (seen[key].copy() for key in ("betas", "length", "camera"))
    for rows in groups(seen["track"], seen["side"] == "left"):
        betas[rows] = seen["betas"][rows].mean(0)
        length[rows] = network.length(betas[rows[0]])
        # A hand that is held to be smaller stands nearer, so that it fills the same pixels.
        factor = length[rows] / seen["length"][rows]
        camera[rows] *= np.stack([1 / factor, factor, factor], 1)
    return seen | {"betas": betas, "length": length, "camera": camera}


def steady(seen, seconds):
    """The table of follow_hands, smoothed in time: rotmats, and camera as the wrist's pixels and those of a
    metre."""
    rotmats = seen["rotmats"].copy()
    half = (seen["crop"][:, 2:3] - seen["crop"][:, :1]) / 2  # (M, 1) pixels
    middle = seen["crop"][:, :2] + half  # (M, 2) pixels
    scale = half * seen["camera"][:, :1]  # (M, 1) pixels a metre
    wrist = middle + scale * seen["camera"][:, 1:]  # (M, 2) pixels
    for rows in groups(seen["track"], seen["part"]):
        times = seen["time"][rows]
        rotmats[rows] = smooth_rotations(rotmats[rows], times, seconds)
        wrist[rows] = smooth(wrist[rows], times, seconds)
        scale[rows] = np.exp(smooth(np.log(scale[rows]), times, seconds))
    camera = np.concatenate([scale / half, (wrist - middle) / scale], axis=1)
    return seen | {"rotmats": np.float32(rotmats), "camera": np.float32(camera)}


def place_all(seen, network, millimetres, keys=KEYS, at_once=1000):
    """The `keys` of NAME.npz for the table of follow_hands. millimetres: --hand-length."""
    count = len(seen["frame"])
    whole = {}
    for start in range(0, count, at_once):  # meshes of a long video take gigabytes: each is held once
        some = {key: values[start:start + at_once] for key, values in seen.items()}
        some |= network.hands(some["rotmats"], some["betas"], some["side"])
        hands = []
        for i, length in enumerate(some["length"]):
            row = {key: values[i] for key, values in some.items()}
            hand = place_hand(row, row["crop"], row["side"], row["K"], row["source"],
                              true_size(length, millimetres))
            hands.append({key: hand[key] for key in keys})
        for key, values in as_table(hands).items():
            if start == 0:
                whole[key] = np.empty((count, *values.shape[1:]), values.dtype)
            whole[key][start:start + at_once] = values
    return whole | {key: seen[name] for key, name in (("side", "side"), ("focal_source", "source"))
                    if key in keys}  # texts of any length


def predict_video(path, name, network, boxes, detect, args):
    """Writes NAME.npz of a video, then NAME/. boxes: of read_frame_boxes; detect: the detector; or None."""
    if boxes == {}:
        raise ValueError(f"--boxes {args.boxes}: no line for a frame of {path} (they are called "
                         f"{path}/000000{'.png' if path.is_dir() else ''}, ...)")
    rate = args.fps if path.is_dir() else frame_rate(path) or args.fps
    start = time.perf_counter()
    find = finder_of(boxes, args, detect, network.box_scale)
    rows, count, unread, beside = follow_hands(path, network, find, rate, args)
    for what, names in (("frames that could not be read", unread),
                        ("frames with a box beside the picture, or far larger", beside),
                        (f"frames of --boxes {args.boxes} that it has not",
                         [name for name in boxes or () if name not in unread])):
        if names:
            print(f"{path}: {what}: {len(names)} (the first is {names[0]})")
    if not rows:
        raise ValueError(f"{path}: no hand found in any frame")
    seen = hold_shape(as_table(rows), network)
    rough = place_all(seen, network, args.hand_length, ("joints", "translation"))
    smoothed = steady(seen, args.smooth) if args.smooth else seen
    hands = place_all(smoothed, network, args.hand_length) | {key: seen[key] for key in ROW_KEYS - KEYS}
    seconds = time.perf_counter() - start
    with staged_folder(args.out) as part:
        np.savez(part / f"{name}.npz", **hands)
        shutil.rmtree(args.out / name, ignore_errors=True)  # of an earlier call, as is_result has said
    frames, tracks = (len(np.unique(hands[key])) for key in ("frame", "track"))
    print(f"{args.out / name}.npz: {tracks} hands in {frames} of {count} frames, {count / seconds:.1f} "
          f"frames a second without drawing; focal length by {hands['focal_source'][0]}")
    for what, share in (("about the wrist", 0), ("in the room", 1)):
        after, before = (jitter(1000 * (table["joints"] + share * table["translation"][:, None]),
                                hands["track"], hands["frame"]) for table in (hands, rough))
        print(f"jitter of the joints {what}: {after:.2f} mm a frame squared, {before:.2f} before smoothing")
    if not args.no_overlays:  # where it fails, the hands are there
        with staged_folder(args.out) as part:
            draw_video(part / name, path, rate, hands, network.faces)


def draw_video(folder, path, rate, hands, faces):
    """The overlays of a video, which is read once more. hands: of NAME.npz, in the order of the frames."""
    with OverlayWriter(folder, path, rate) as writer:
        for number, (name, frame) in enumerate(tqdm(frames_of(path), unit="frame", desc="drawing")):
            if frame is not None:
                first, end = np.searchsorted(hands["frame"], [number, number + 1])
                shown = [{key: values[i] for key, values in hands.items()} for i in range(first, end)]
                writer.add(name, draw_hands(np.asarray(frame), 1, shown, faces))


# ------------------------------------------------------------------------------------------------------- main
def flags():
    cli = parser(__doc__)
    cli.add_argument("images", nargs="+", type=Path, metavar="IMAGE",
                     help="photographs, folders of them, videos")
    cli.add_argument("--checkpoint", type=Path, default=WEIGHTS,
                     help="RUN/last.pt of finetune_mesh.py (default: weights/hand.pt beside this file)")
    cli.add_argument("--out", type=Path, default=Path("predictions"),
                     help="folder for the results (default predictions)")
    cli.add_argument("--mano", metavar="FILE",
                     help="MANO file that the checkpoint was trained with (default: the synthetic hand)")
    cli.add_argument("--batch-size", type=int, default=32, help="hands at a time (default 32)")
    where = cli.add_argument_group("where the hands are")
    where.add_argument("--boxes", type=Path,
                       help="CSV image,x0,y0,x1,y1[,side]; frames of a video are called clip.mp4/000000, "
                            "..., the clip as on the command line or relative to the folder given there")
    where.add_argument("--detector", choices=["mediapipe"],
                       help="finds hands and sides (requirements-video.txt)")
    where.add_argument("--side", default="right", choices=["right", "left"],
                       help="side of the hands where nothing else says it (default right)")
    where.add_argument("--refine", type=int, metavar="N",
                       help="crop again around the mesh, N times (default 1, with --detector 0)")
    room = cli.add_argument_group("where they are in the room", "without --K and --focal a photograph's tags "
                                  "say how long its lens is, else its longer side is the guess")
    room.add_argument("--K", nargs=4, type=float, metavar=("FX", "FY", "CX", "CY"),
                      help="camera of the upright photographs, in pixels")
    room.add_argument("--focal", type=float, help="focal length in pixels; the centre is the picture's")
    room.add_argument("--hand-length", type=float, metavar="MM",
                      help="wrist to tip of the middle finger of the flat hand: fixes size and depth")
    clip = cli.add_argument_group("videos")
    clip.add_argument("--video", action="store_true", help="folders hold videos, or the frames of one")
    clip.add_argument("--no-overlays", action="store_true", help="NAME.npz alone, drawn nothing")
    clip.add_argument("--fps", type=float, default=30.0,
                      help="frames a second of folders of frames (default 30)")
    clip.add_argument("--smooth", type=float, default=0.07, metavar="SECONDS",
                      help="deviation of the window in time over which motion is smoothed; 0: not at all "
                           "(default .07)")
    add_device_flags(cli, workers=False)
    return cli


def check(args):
    """ValueError where flags contradict each other or a path is missing."""
    if args.K and args.focal:
        raise ValueError("--K holds the focal length: leave --focal out")
    if args.boxes and args.detector:
        raise ValueError("--boxes and --detector both say where the hands are: leave one out")
    check_ranges(args, {"batch_size": (1, 10**6), "focal": (1, 1e6), "hand_length": (1, 1e4),
                        "fps": (0.01, 1e4), "smooth": (0, 0.5), "refine": (0, 100)})
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is a file: name a folder")
    for path in args.images:
        if not path.exists():
            raise ValueError(f"{path}: no such photograph, video or folder")


def _named(error, path):
    """What an error says, with the name of the photograph or video."""
    return str(error) if str(path) in str(error) else f"{path}: {error}"


def main(argv=None):
    args = flags().parse_args(argv)
    check(args)
    if args.refine is None:
        args.refine = 0 if args.detector else 1
    runtime = setup(args, alone=True)
    network = Network(args.checkpoint, args.mano, runtime)
    detect = mediapipe_detector() if args.detector else None
    clips = [path for path in args.images
             if (args.video if path.is_dir() else path.suffix.lower() in VIDEO_SUFFIXES)]
    images = find_images([path for path in args.images if path not in clips], args.out)
    clips = find_clips(clips, args.out)
    boxes = [None] * len(clips)
    if args.boxes and clips:
        boxes = read_frame_boxes(args.boxes, clips, is_all=not images)
    check_writable(args.out)
    if detect:  # it takes long: what can be refused before, is
        refuse_others_files([(path, path.stem) for path, _ in images],
                            [(path, clip_name(path)) for path, _ in clips], args.out)
    names = Names()
    hands = find_hands(images, args.boxes, args.side, detect, names, not clips) if images else []
    videos = [(path, names.free(clip_name(path))) for path, _ in clips]
    refuse_others_files(hands, videos, args.out)
    is_new = not args.out.exists()
    args.out.mkdir(parents=True, exist_ok=True)
    failures = predict_photographs(hands, network, args) if hands else []
    for (path, name), frames in zip(videos, boxes, strict=True):
        try:
            predict_video(path, name, network, frames, detect, args)
        except ValueError as error:
            failures.append(_named(error, path))
    if is_new and not any(args.out.iterdir()):
        args.out.rmdir()
    for failure in failures[:-1]:
        print(f"error: {failure}", file=sys.stderr)
    if failures:
        raise ValueError(f"{failures[-1]} ({len(failures)} of {len(hands) + len(videos)} failed)")


if __name__ == "__main__":
    run(main)
