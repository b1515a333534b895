"""Draws a data set that nobody has to license: posed hands in cluttered scenes with every label, no OpenGL.

--layout index writes an index with its images, boxes.csv and samples.png. --layout freihand writes FreiHAND's
own files, so that its reader can be tried without the data: right hands, four backgrounds for each training
hand, 10 % evaluation.

Poses are drawn around the rows of `hands_coeffs`. In the everyday look half of the videos show `gestures`,
not with --mano. A video has one person, light, camera and background, while pose and view move smoothly from
key pose to key pose. Everything is a function of (seed, video, frame): the same seed gives the same bytes for
any number of workers. 6 ms an image of 128 pixels on one core. The whole recipe is ours. How a picture is
drawn: `surfaces.py` (hand, arm, objects), `rooms.py` (what lies behind), `photo.py` (light, camera).
"""

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.spatial.transform import Rotation, Slerp
from tqdm import tqdm

import photo
import rooms
import surfaces
from data import find_backgrounds, mirror, read_image, write_index
from draw import draw_joints, grid, rasterise, save_image, vertex_normals
from mano import TIPS, Mano, joints_from_vertices, read_mano, rotmat_from_axis_angle
from runtime import check_ranges, cores, parser, run
from saving import refuse_files, staged_folder
from synthetic_hand import gestures, synthetic_mano

MIDDLE = 9  # joint whose place FreiHAND's labels hold
FREE_COMPONENTS = 8  # of the pose prior: the others move a quarter as much, so that similar poses recur
HAND_LENGTH = 0.165  # metres
KEY_EVERY = 5  # frames between key poses
VERSIONS = 4  # pictures of one training hand in FreiHAND
WORTH_A_WORKER = 300  # images of 128 pixels: as long as it takes to start one more process
GREEN_SCREEN = (0.16, 0.62, 0.25)  # sRGB, behind the first of them


# ---------------------------------------------------------------------------------------------- pose and view
def key_frames(frames):
    """How many key poses a video has: at least its first and its last frame."""
    return max(2, frames // KEY_EVERY + 1)


def between_keys(keys, frames):
    """Values (n, ...) of n = `frames` frames, which pass smoothly through keys (M, ...), M >= 2."""
    position = np.linspace(0, len(keys) - 1, frames) if frames > 1 else np.zeros(1)
    before = np.minimum(position.astype(int), len(keys) - 2)
    mix = (position - before).reshape(-1, *[1] * (keys.ndim - 1))
    mix = mix * mix * (3 - 2 * mix)
    return keys[before] * (1 - mix) + keys[before + 1] * mix


def random_axis(rng):
    return photo.unit(rng.standard_normal(3))


def turn_about(axis, degrees):
    return Rotation.from_rotvec(axis * np.deg2rad(degrees))


def first_view(rng, tilt, anywhere):
    """Global rotation of a hand as people hold it before a camera.

    The back or the palm faces the camera and the fingers point up. Then the hand is turned about any axis by
    N(0, tilt) degrees. With probability `anywhere` it is seen from any direction instead.
    """
    if rng.random() < anywhere:
        return Rotation.from_quat(rng.standard_normal(4))
    back = photo.pick(rng, -1.0, 1.0)  # at rest the fingers point to -x and the back of the hand to +y
    held = Rotation.from_matrix(np.array([[0, 0, back], [1, 0, 0], [0, back, 0]]))
    return turn_about(random_axis(rng), rng.normal(0, tilt)) * held


def random_poses(rng, arrays, frames, tilt, anywhere, signs=()):
    """pose (n, 48), axis-angle: the global rotation, then offsets to `hands_mean`.

    signs (M, 45): offsets of gestures. Where there are any, every second video shows them.
    """
    keys = key_frames(frames)
    known = arrays["hands_coeffs"]
    coeffs = known[rng.integers(len(known), size=keys)]
    coeffs = coeffs + 0.2 * rng.standard_normal(coeffs.shape)  # near a known pose, so that poses recur
    coeffs[:, FREE_COMPONENTS:] *= 0.25
    shown = coeffs @ arrays["hands_components"]  # (M, 45)
    if len(signs) and rng.random() < 0.5:
        shown = signs[rng.integers(len(signs), size=keys)]
    views = [first_view(rng, tilt, anywhere)]
    for degrees in rng.normal(0, 0.8 * tilt, keys - 1):
        views.append(turn_about(random_axis(rng), degrees) * views[0])
    times = between_keys(np.arange(keys, dtype=float), frames)
    view = Slerp(np.arange(keys), Rotation.concatenate(views))(times).as_rotvec()  # (n, 3)
    fingers = between_keys(shown, frames)  # (n, 45)
    return np.concatenate([view, fingers], 1)


def place_before_camera(rng, joints, size):
    """Where the hand of each frame lies: offset (n, 1, 3) to add to joints (n, 21, 3), and K (3, 3)."""
    frames = len(joints)
    keys = key_frames(frames)
    depth = rng.uniform(0.4, 1.0)
    fill = rng.uniform(0.58, 0.76)  # part of the picture that a stretched hand fills
    focal = fill * depth / HAND_LENGTH * size
    centre = (size - 1) / 2 + rng.normal(0, 0.02, 2) * size
    low = joints[..., :2].min(1)
    high = joints[..., :2].max(1)
    extent = (high - low).max(1)  # (n,) metres
    fills = fill * between_keys(rng.uniform(0.86, 1.14, keys), frames)
    z = focal * np.sqrt(extent * HAND_LENGTH) / (fills * size)  # the root: a fist looks somewhat smaller
    z = np.clip(z, 0.32, 1.3)
    margin = 0.5 - 0.5 * extent * focal / (z * size)  # part of the picture that is free beside the hand
    margin = np.maximum(margin, 0.03)
    shift = between_keys(rng.uniform(-0.75, 0.75, (keys, 2)), frames) * margin[:, None]
    target = (size - 1) / 2 + shift * size  # (n, 2) pixels
    x_y = (target - centre) * (z / focal)[:, None] - (low + high) / 2
    offset = np.concatenate([x_y, (z - joints[..., 2].mean(1))[:, None]], 1)
    K = np.array([[focal, 0, centre[0]], [0, focal, centre[1]], [0, 0, 1]])
    return offset[:, None], K


def random_labels(rng, hand, arrays, frames, size, tilt, anywhere, signs=()):
    """Labels of one video of right hands, float64.

    pose (n, 48), betas (n, 10); vertices (n, V, 3) and joints (n, 21, 3) in metres in the camera's frame;
    joints2d (n, 21, 2) in pixels, K (n, 3, 3), scale (n,).
    """
    pose = random_poses(rng, arrays, frames, tilt, anywhere, signs)
    betas = np.clip(rng.normal(0, 0.9, (1, 10)), -2.2, 2.2)
    betas = np.repeat(betas, frames, 0)
    angles = torch.from_numpy(pose + np.r_[np.zeros(3), arrays["hands_mean"]]).reshape(-1, 16, 3)
    with torch.no_grad():
        vertices = hand(rotmat_from_axis_angle(angles), torch.from_numpy(betas))[0]
        joints = joints_from_vertices(vertices, arrays).numpy()  # (n, 21, 3)
    if not np.ptp(joints, axis=1).max() < 1:
        raise ValueError("the hand model makes hands of over a metre: is the file of --mano damaged?")
    offset, K = place_before_camera(rng, joints, size)
    joints = joints + offset
    joints2d = joints[..., :2] / joints[..., 2:] * K[0, 0] + K[:2, 2]
    scale = np.linalg.norm(joints[:, MIDDLE] - joints[:, MIDDLE + 1], axis=1)
    return {"pose": pose, "betas": betas, "vertices": vertices.numpy() + offset, "joints": joints,
            "joints2d": joints2d, "K": np.repeat(K[None], frames, 0), "scale": scale}


def detect(rng, joints2d, hidden, size):
    """keypoints (21, 2) and score (21,), 0 where one is missing, as a detector gives them.

    The noise grows with the hand and is larger where a joint is hidden. Now and then neighbouring fingers
    are exchanged, joints are missing, or the whole hand is missed.
    """
    noise = rng.standard_normal((21, 2)) * np.where(hidden, 0.045, 0.016)[:, None] * rng.uniform(0.6, 1.6)
    keypoints = joints2d + noise * np.ptp(joints2d, axis=0).max()
    score = np.where(hidden, 0.62, 0.93) - 3 * np.linalg.norm(noise, axis=1) + rng.normal(0, 0.04, 21)
    if rng.random() < 0.05:
        first = 5 + 4 * int(rng.integers(3))
        keypoints[first:first + 8] = np.roll(keypoints[first:first + 8], 4, 0)
    if rng.random() < 0.04:
        pair = rng.choice(21, 2, replace=False)
        keypoints[pair] = keypoints[pair[::-1]]
    missing = rng.random(21) < np.where(hidden, 0.06, 0.01)
    missing |= rng.random() < 0.03
    missing |= ((keypoints < 0) | (keypoints > size - 1)).any(1)
    keypoints[missing] = 0
    return keypoints, np.where(missing, 0, score.clip(0.05, 1))


# ------------------------------------------------------------------------------------------------ one picture
@dataclass
class Person:
    """What all frames of a video show besides the posed hand. An object is vertices, faces, colours."""

    skin: surfaces.Skin
    arm: surfaces.Arm
    held: tuple | None  # object in the hand
    grip: np.ndarray  # (3,) metres, where it lies in the palm
    occluder: tuple | None  # object in front of the hand,
    covers: int  # before this joint,
    drift: np.ndarray  # (n, 3) metres beside it in each frame


@dataclass
class Look:
    """What chooses how the pictures look. Each function takes a random generator."""

    skin: Callable  # -> surfaces.Skin
    arm: Callable  # -> surfaces.Arm
    thing: Callable  # -> an object, in the hand or before it
    light: Callable  # -> photo.Light
    camera: Callable  # -> photo.Camera
    rooms: float  # part of the backgrounds that show rooms; the others are photo.random_background's
    held: float  # part of the hands that hold an object
    occluders: float  # part that has one in front
    signs: bool  # hands count and spell in every second video


LOOKS = {
    "everyday": Look(surfaces.everyday_skin, surfaces.everyday_arm, surfaces.everyday_object,
                     photo.everyday_light, photo.everyday_camera,
                     rooms=0.92, held=0.18, occluders=0.12, signs=True),
    "plain": Look(surfaces.random_skin, surfaces.random_arm, surfaces.random_object,
                  photo.random_light, photo.random_camera, rooms=0, held=0.3, occluders=0.2, signs=False),
}
PHOTOGRAPHED = 0.7  # part of the backgrounds that are cut out of --backgrounds


def random_person(rng, frames, look):
    skin = look.skin(rng)
    arm = look.arm(rng)
    held = look.thing(rng) if rng.random() < look.held else None
    grip = rng.normal(0, 0.008, 3)
    occluder = look.thing(rng) if rng.random() < look.occluders else None
    covers = int(rng.integers(21))
    drift = between_keys(rng.normal(0, 0.025, (key_frames(frames), 2)), frames)
    return Person(skin, arm, held, grip, occluder, covers, np.pad(drift, ((0, 0), (0, 1))))


def random_background(rng, size, look, photographs):
    """(3, H, H), H = 1.25 size. photographs: paths, of which most backgrounds are cut where there are any."""
    if photographs and rng.random() < PHOTOGRAPHED:
        path = photographs[rng.integers(len(photographs))]
        return rooms.cut_of(rng, read_image(path, smallest=2 * size)[0], int(1.25 * size))
    if look.rooms and rng.random() < look.rooms:
        return rooms.random_room(rng, int(1.25 * size), surfaces.SKIN_TONES)
    return photo.random_background(rng, size, tones=surfaces.SKIN_TONES)


def random_scene(rng, size, look, photographs):
    """Light, camera and background of a video."""
    light = look.light(rng)
    camera = look.camera(rng)
    return light, camera, random_background(rng, size, look, photographs)


def painted(vertices, faces, colors, closed=True):
    """Mesh in colours (N, 3), sRGB 0..1."""
    normals = vertex_normals(vertices, faces)
    return photo.Mesh(vertices, faces, normals, colors**2.2, photo.matt, (0.05, 0.05, 0.05), closed)


def build_scene(surface, person, labels, frame):
    """Meshes of one picture: the hand with its forearm first, then sleeve, held object, occluder, if any."""
    vertices = labels["vertices"][frame]
    rotmat = Rotation.from_rotvec(labels["pose"][frame, :3]).as_matrix()
    arm, sleeve = surfaces.forearm(surface, person.arm, vertices, rotmat)
    hand = np.concatenate([vertices, arm])
    skin = partial(surfaces.skin_color, person.skin)
    normals = vertex_normals(hand, surface.faces)
    meshes = [photo.Mesh(hand, surface.faces, normals, surface.coordinates, skin, wrap=(0.3, 0.16, 0.12))]
    if sleeve is not None:
        colors = np.tile(person.arm.cloth, (len(sleeve), 1))
        meshes.append(painted(sleeve, surface.sleeve_faces, colors, closed=False))
    if person.held is not None:
        shape, faces, colors = person.held
        axes = np.stack([np.cross(surface.back, surface.across), surface.back, surface.across])
        rest = shape @ axes
        rest += surface.palm + person.grip - surface.back * (0.014 + np.abs(shape[:, 1]).max())
        rest -= surface.coordinates[:len(vertices), :3].mean(0)  # from the hand's middle
        meshes.append(painted(rest @ rotmat.T + vertices.mean(0), faces, colors))
    if person.occluder is not None:
        shape, faces, colors = person.occluder
        joint = labels["joints"][frame, person.covers]
        place = 0.72 * joint + person.drift[frame]  # nearer, on the same ray
        meshes.append(painted(0.7 * shape + place, faces, colors))
    return meshes


def hidden_joints(labels, frame, depth):
    """(21,) joints behind an object or behind another part of the hand. depth: of `photo.Seen`."""
    u, v = np.clip(2 * labels["joints2d"][frame] + 1, 0, len(depth) - 1).astype(int).T
    return labels["joints"][frame, :, 2] > depth[v, u] + 0.016  # metres, about a finger's thickness


def hand_mask(vertex, count):
    """(size, size) uint8, 255 where most of a pixel shows one of the hand's `count` vertices."""
    shown = (vertex >= 0) & (vertex < count)
    return (photo.half_size(shown.astype(np.float32)) > 0.5).astype(np.uint8) * 255


# -------------------------------------------------------------------------------------------------- one video
TOOLS = {}  # what a process needs to draw; start_worker fills it once


def start_worker(arrays, look="plain", photographs=(), ours=True):
    """ours: the hand is synthetic_mano()."""
    torch.set_num_threads(1)
    normals = vertex_normals(arrays["v_template"], arrays["f"])
    # They fit our hand alone: another hand's joints bend about other axes.
    signs = gestures() - arrays["hands_mean"] if LOOKS[look].signs and ours else ()
    surface = surfaces.HandSurface(arrays, normals, TIPS["freihand"])
    TOOLS.update(arrays=arrays, hand=Mano(arrays).double(), surface=surface, look=LOOKS[look],
                 photographs=photographs, signs=signs)


def start_process(*tools):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the main one answers
    threading.Thread(target=end_with_main_process, daemon=True).start()
    start_worker(*tools)


def end_with_main_process():
    """The main process may be killed. This one would be left behind."""
    multiprocessing.parent_process().join()
    os._exit(1)


@dataclass
class Video:
    """One video to draw."""

    key: tuple  # seed, part, number of the video: with frame and version, the seed of every random number
    frames: int
    first: int  # number of its first picture
    hands: int  # of the part: picture k + hands * version shows hand k
    versions: int  # pictures of each hand
    size: int
    folder: Path  # of the pictures
    layout: str
    tilt: float  # tilt and anywhere: see first_view
    anywhere: float


def draw_video(video):
    """Draws one video, writes its pictures and returns its labels, name -> (n, ...)."""
    size = video.size
    look = TOOLS["look"]
    photographs = TOOLS["photographs"]
    freihand = video.layout == "freihand"
    many = video.versions > 1  # FreiHAND's training hands: first on a green screen, then anywhere
    rng = np.random.default_rng(video.key)
    labels = random_labels(rng, TOOLS["hand"], TOOLS["arrays"], video.frames, size,
                           video.tilt, video.anywhere, TOOLS["signs"])
    person = random_person(rng, video.frames, look)
    left = bool(rng.random() < 0.3) and not freihand
    scenes = [random_scene(rng, size, look, photographs) for _ in range(video.versions)]
    keypoints = np.zeros((video.frames, 21, 2))
    score = np.zeros((video.frames, 21))
    for frame in range(video.frames):
        before = max(frame - 1, 0)
        after = min(frame + 1, video.frames - 1)
        motion = labels["joints2d"][after, MIDDLE] - labels["joints2d"][before, MIDDLE]
        meshes = build_scene(TOOLS["surface"], person, labels, frame)
        seen = photo.see(meshes, labels["K"][frame], size, rasterise)
        for version, (light, camera, background) in enumerate(scenes):
            rng = np.random.default_rng([*video.key, frame, version])
            if many and version == 0:
                background = np.full_like(background, np.reshape(GREEN_SCREEN, (3, 1, 1)))
            elif many:
                background = random_background(rng, size, look, photographs)
            layer = photo.illuminate(seen, light, rasterise)
            image = photo.photograph(rng, camera, light, background, layer, motion)
            if left:
                image = np.ascontiguousarray(image[:, ::-1])
            path = video.folder / f"{video.first + frame + version * video.hands:08d}.jpg"
            Image.fromarray(image).save(path, quality=camera.quality)
            if version == 0:
                hidden = hidden_joints(labels, frame, seen.depth)
                keypoints[frame], score[frame] = detect(rng, labels["joints2d"][frame], hidden, size)
                if many:
                    mask = hand_mask(seen.vertex, labels["vertices"].shape[1])
                    Image.fromarray(mask).save(video.folder.parent / "mask" / path.name, quality=95)
    joints2d = labels["joints2d"]
    labels["visible"] = ((joints2d >= -0.5) & (joints2d <= size - 0.5)).all(2)
    labels |= {"keypoints": keypoints, "keypoints_score": score}
    if left:
        labels = mirrored(labels, size)
    labels |= {"side": np.full(video.frames, left), "video": np.full(video.frames, video.key[-1])}
    if freihand:
        return labels  # its files hold all digits
    return {name: value.astype(np.float32) for name, value in labels.items()}


def mirrored(labels, size):
    """The labels of a video whose pictures were mirrored, so that its right hands became left ones."""
    labels = labels | {name: mirror(name, labels[name]) for name in ("joints", "vertices", "pose")}
    labels["K"][:, 0, 2] = size - 1 - labels["K"][:, 0, 2]
    for name in ("joints2d", "keypoints"):
        labels[name][..., 0] = size - 1 - labels[name][..., 0]
    labels["keypoints"][labels["keypoints_score"] == 0] = 0
    return labels


def draw_videos(args, arrays, part, hands, videos, folder, versions):
    """Draws all pictures of one part (0 or 1: FreiHAND's training or evaluation) into `folder`.

    Returns their labels, name -> (hands, ...), in the order of the pictures.
    """
    folder.mkdir(parents=True)
    tasks = []
    first = 0
    for number in range(videos):
        frames = hands // videos + (number < hands % videos)
        tasks.append(Video((args.seed, part, number), frames, first, hands, versions, args.size, folder,
                           args.layout, args.tilt, args.anywhere))
        first += frames
    workers = min(args.workers, videos)
    threads = torch.get_num_threads()
    tools = (arrays, args.look, args.photographs, not args.mano)
    pool = None
    if workers > 1:  # spawned: forking a process that holds torch's threads can hang
        spawn = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, spawn, start_process, tools)
    else:
        start_worker(*tools)
    drawn = []
    try:
        with tqdm(total=hands * versions, unit="image", desc="drawing", smoothing=0.05) as bar:
            for labels in (pool.map if pool else map)(draw_video, tasks):
                drawn.append(labels)
                bar.update(len(labels["side"]) * versions)
    except BaseException:
        for process in multiprocessing.active_children():  # else they would end their videos first
            process.terminate()
        raise
    finally:
        torch.set_num_threads(threads)
        if pool:
            pool.shutdown(cancel_futures=True)
    return {name: np.concatenate([labels[name] for labels in drawn]) for name in drawn[0]}


# ---------------------------------------------------------------------------------------------------- layouts
def write_index_layout(out, args, arrays):
    """Writes the index and boxes.csv into `out`. Returns paths of the pictures, joints2d and side of each."""
    labels = draw_videos(args, arrays, 0, args.hands, args.videos, out / "images", 1)
    names = [f"images/{k:08d}.jpg" for k in range(args.hands)]
    low = labels["joints2d"].min(1) + 0.5  # pixel edges
    high = labels["joints2d"].max(1) + 0.5
    boxes = np.concatenate([low, np.maximum(high, low + 1)], 1)
    rows = ["image,x0,y0,x1,y1,side\n"]  # as predict.py takes them
    for name, box, left in zip(names, boxes, labels["side"], strict=True):
        edges = ",".join(f"{edge:.2f}" for edge in box)
        rows.append(f"{Path(name).name},{edges},{'left' if left else 'right'}\n")
    (out / "boxes.csv").write_text("".join(rows))
    size = np.full((args.hands, 2), args.size)
    columns = labels | {"image": np.array(names, "S"), "box": boxes, "size": size}
    # The 45 articulation numbers are offsets to hands_mean. Joints are regressed from the posed mesh, as
    # FreiHAND's are.
    meta = {"name": "synthetic", "joints": "freihand", "pose_mean": True,
            "hand": "mano" if args.mano else "synthetic"}
    write_index(out, columns, meta)
    return [out / name for name in names], labels["joints2d"], labels["side"]


def write_freihand_layout(out, args, arrays):
    """FreiHAND's files as its authors ship them, both roots in `out`. Returns as write_index_layout."""
    (out / "training" / "mask").mkdir(parents=True)
    evaluation = max(1, args.hands // 10)
    names = []
    joints2d = []
    parts = (("training", args.hands - evaluation, VERSIONS), ("evaluation", evaluation, 1))
    for part, (name, hands, versions) in enumerate(parts):
        folder = out / name / "rgb"
        videos = max(1, min(hands, round(args.videos * hands / args.hands)))
        labels = draw_videos(args, arrays, part, hands, videos, folder, versions)
        write_freihand_labels(out, name, labels)
        names += [folder / f"{k:08d}.jpg" for k in range(hands * versions)]
        joints2d += [labels["joints2d"]] * versions
    return names, np.concatenate(joints2d), np.zeros(len(names))


def write_freihand_labels(out, part, labels):
    K = labels["K"]
    root = labels["joints"][:, MIDDLE]
    # 61 numbers: pose, shape, then u, v and s: joint 9 lies at ((u - cx) / s, (v - cy) / s, f / s).
    s = K[:, :1, 0] / root[:, 2:]
    u_v = root[:, :2] * s + K[:, :2, 2]
    mano = np.concatenate([labels["pose"], labels["betas"], u_v, s], 1)[:, None]
    files = {"K": K, "mano": mano, "scale": labels["scale"], "verts": labels["vertices"],
             "xyz": labels["joints"]}
    for name, value in files.items():
        (out / f"{part}_{name}.json").write_text(json.dumps(value.tolist()))


def write_samples(path, names, joints2d, side, size, cell=192):
    """24 pictures from all over the set with their labelled skeletons: look at them."""
    rows = np.unique(np.linspace(0, len(names) - 1, 24).round().astype(int))
    pictures = []
    for row in rows:
        with Image.open(names[row]) as image:
            large = np.asarray(image.resize((cell, cell), Image.Resampling.BICUBIC))
        pictures.append(draw_joints(large, (joints2d[row] + 0.5) * (cell / size) - 0.5))
    labels = [f"{row} {'left' if side[row] else 'right'}" for row in rows]
    save_image(path, grid(pictures, 6, labels))


# ------------------------------------------------------------------------------------------------------- main
def flags():
    cli = parser(__doc__)
    cli.add_argument("--out", required=True, type=Path,
                     help="folder to make; refused where there are files already")
    cli.add_argument("--layout", choices=["index", "freihand"], default="index",
                     help="format of the labels: our index (default), or FreiHAND's own files")
    cli.add_argument("--hands", type=int, default=2000,
                     help="number of labelled hands (default 2000). freihand: 4 pictures of a training hand")
    cli.add_argument("--videos", type=int,
                     help="number of videos that they are taken from (default: one for 20 hands)")
    cli.add_argument("--size", type=int,
                     help="side of a picture in pixels, 32 to 1024 (default 128; freihand 224)")
    cli.add_argument("--tilt", type=float, default=35.0,
                     help="spread of the view in degrees about a hand held up before the camera (default 35; "
                          "10 is easy)")
    cli.add_argument("--anywhere", type=float, default=0.25,
                     help="part of the videos seen from any direction, 0 to 1 (default 0.25)")
    cli.add_argument("--look", choices=list(LOOKS), default="everyday",
                     help="everyday (default): rooms, everyday light, people's skin, hands that count and "
                          "spell. plain: as the hands of docs/experiments.md were drawn")
    cli.add_argument("--backgrounds", type=Path,
                     help="folder of photographs without hands, of which 70 %% of the backgrounds are cut")
    cli.add_argument("--mano", type=Path,
                     help="MANO_RIGHT.pkl or .npz of the hand to draw (default: the synthetic hand)")
    cli.add_argument("--seed", type=int, default=0,
                     help="seed of everything drawn (default 0): the same seed gives the same bytes")
    cli.add_argument("--workers", type=int,
                     help="processes that draw (default: one a core, at most 8, fewer for a small set); the "
                          "bytes do not change")
    return cli


def main(argv=None):
    args = flags().parse_args(argv)
    freihand = args.layout == "freihand"
    if args.videos is None:
        args.videos = max(1, args.hands // 20)
    if args.size is None:
        args.size = 224 if freihand else 128
    if args.workers is None:
        images = args.hands * (VERSIONS if freihand else 1) * (args.size / 128) ** 2
        args.workers = min(8, cores(), 1 + int(max(images, 0) / WORTH_A_WORKER))
    check_ranges(args, {"hands": (2 if freihand else 1, 10**8), "videos": (1, max(args.hands, 1)),
                        "size": (32, 1024), "tilt": (0, 180), "anywhere": (0, 1), "seed": (0, 2**63),
                        "workers": (1, 512)})
    refuse_files(args.out)
    args.photographs = find_backgrounds(args.backgrounds) if args.backgrounds else []
    arrays = read_mano(args.mano) if args.mano else synthetic_mano()
    if np.diff(arrays["J"][[0, 4], 0]) > 0:  # MANO's right hand points to -x
        raise ValueError(f"--mano {args.mano}: a left hand; give MANO_RIGHT.pkl, which is mirrored")

    begin = time.time()
    write = write_freihand_layout if freihand else write_index_layout
    with staged_folder(args.out) as folder:  # whole, or not at all
        names, joints2d, side = write(folder, args, arrays)
        speed = len(names) / (time.time() - begin)
        write_samples(folder / "samples.png", names, joints2d, side, args.size)
    print(f"{args.out}: {args.hands} hands, {len(names)} images of {args.size} px, "
          f"{100 * np.mean(side):.0f} % left, {speed:.1f} images/s; look at {args.out / 'samples.png'}")


if __name__ == "__main__":
    run(main)
