"""metrics.py against independently written loops over samples, and the traps of published evaluations."""

import numpy as np
import pytest
from scipy.linalg import orthogonal_procrustes
from scipy.spatial.distance import cdist

import metrics

B, J, V = 7, 21, 778


def hands(number=B, seed=0, noise=0.006):
    """Hand-sized random points: prediction and truth, joints and vertices, half a metre from the camera."""
    rng = np.random.default_rng([seed, number])
    gt_vertices = rng.normal(0, 0.03, (number, V, 3)) + [0.02, -0.01, 0.6]
    gt_joints = gt_vertices[:, ::38][:, :J] + rng.normal(0, 0.002, (number, J, 3))
    pred_joints = 1.1 * gt_joints + rng.normal(0, noise, gt_joints.shape) + [0, 0.01, -0.05]
    pred_vertices = 1.1 * gt_vertices + rng.normal(0, noise, gt_vertices.shape) + [0, 0.01, -0.05]
    return pred_joints, pred_vertices, gt_joints, gt_vertices


# ------------------------------------ the independent transcription: one sample and one point at a time

def loop_align(gt, pred, reflect=True):
    centre = gt.mean(0)
    g, p = gt - centre, pred - pred.mean(0)
    size = np.linalg.norm(g) + 1e-8
    g, p = g / size, p / (np.linalg.norm(p) + 1e-8)
    rotation, scale = orthogonal_procrustes(g, p)
    if not reflect and np.linalg.det(rotation) < 0:  # the textbook solution: flip the weakest direction
        u, s, vt = np.linalg.svd(p.T @ g)
        flip = np.diag([1, 1, -1])
        rotation, scale = (u @ flip @ vt).T, s[0] + s[1] - s[2]
    return p @ rotation.T * scale * size + centre


def loop_measures(errors, low=0.0, high=0.05, steps=100):
    """errors: a list of errors for each point. Mean, and area under the share of correct points, as EvalUtil
    computes them."""
    thresholds = np.linspace(low, high, steps)
    means, areas = [], []
    for point in errors:
        if not point:
            continue
        share = [np.mean([e <= t for e in point]) for t in thresholds]
        area = 0
        for i in range(steps - 1):
            area += (share[i] + share[i + 1]) / 2 * (thresholds[i + 1] - thresholds[i])
        means.append(np.mean(point))
        areas.append(area / (high - low))
    return np.mean(means), np.mean(areas)


def loop_f(gt, pred, t):
    distance = cdist(gt, pred)
    a, b = np.mean(distance.min(1) < t), np.mean(distance.min(0) < t)
    return 2 * a * b / (a + b) if a + b > 0 else 0.0


def loop_points(gt, pred):
    """Samples x points -> for each point the list of its errors; a NaN label adds nothing."""
    errors = [[] for _ in range(gt.shape[1])]
    for g, p in zip(gt, pred, strict=True):
        for i in range(len(g)):
            if np.isfinite(g[i]).all():
                errors[i].append(float(np.linalg.norm(g[i] - p[i])))
    return errors


def loop_sc_tr(gt, pred):
    """In HO-3D's own order and with its own pair (0, 4), to tie the pair (0, 9) of FreiHAND's order to it."""
    to_ho3d = [0, 5, 6, 7, 9, 10, 11, 17, 18, 19, 13, 14, 15, 1, 2, 3, 4, 8, 12, 16, 20]
    back = np.argsort(to_ho3d)
    g, p = gt[to_ho3d], pred[to_ho3d]
    length = np.sqrt(np.sum(np.square(p[4] - p[0])))
    if length > 0:
        p = p / length
    p = p * np.sqrt(np.sum(np.square(g[4] - g[0])))
    return (p - p[0:1] + g[0:1])[back]


def each(function, gt, pred):
    return np.array([function(g, p) for g, p in zip(gt, pred, strict=True)])


def check(table, expected):
    for key, value in expected.items():
        assert table[key] == pytest.approx(value, abs=1e-9, rel=0), key


def freihand_expected(pj, pv, gj, gv):
    out = {}
    for short, name, gt, pred in (("mpjpe", "joints", gj, pj), ("mpvpe", "vertices", gv, pv)):
        mean, area = loop_measures(loop_points(gt, pred))
        out |= {f"{short}_mm": mean * 1000, f"auc_{name}_unaligned": area}
        mean, area = loop_measures(loop_points(gt, each(loop_align, gt, pred)))
        out |= {f"pa_{short}_mm": mean * 1000, f"auc_{name}": area}
        strict = each(lambda g, p: loop_align(g, p, reflect=False), gt, pred)
        out[f"pa_{short}_noreflect_mm"] = loop_measures(loop_points(gt, strict))[0] * 1000
    aligned = each(loop_align, gv, pv)
    for t in (5, 15):
        out[f"f_{t}"] = np.mean([loop_f(g, p, t / 1000) for g, p in zip(gv, aligned, strict=True)])
        out[f"f_{t}_unaligned"] = np.mean([loop_f(g, p, t / 1000) for g, p in zip(gv, pv, strict=True)])
    return out


DEGENERATE = {"zero": lambda x: 0 * x,
              "one point": lambda x: 0 * x + [0.01, -0.02, 0.7],
              "flat": lambda x: x * [1, 1, 0] + [0, 0, 0.6],
              "on a line": lambda x: x * [1, 0, 0],
              "mirrored": lambda x: x * [-1, 1, 1]}


@pytest.mark.parametrize("kind", DEGENERATE)
def test_equals_the_official_arithmetic_where_it_is_hard(kind):
    """Where a fit is not unique or does not exist: no NaN, and the numbers of the scripts."""
    pj, pv, gj, gv = hands()
    pj, pv = DEGENERATE[kind](pj), DEGENERATE[kind](pv)
    table = metrics.evaluate_hands(pj, pv, gj, gv, "ho3d")
    check(table, freihand_expected(pj, pv, gj, gv))
    mean, area = loop_measures(loop_points(gj, each(loop_sc_tr, gj, pj)))
    check(table, {"sc_tr_mpjpe_mm": mean * 1000, "auc_joints_sc_tr": area})
    if kind in ("zero", "one point"):  # all points lie on the truth's centroid
        spread = np.linalg.norm(gj - gj.mean(1, keepdims=True), axis=2).mean()
        assert table["pa_mpjpe_mm"] == pytest.approx(1000 * spread, abs=1e-9)
        assert table["reflected_joints"] == table["reflected_vertices"] == 0
    assert table["reflected_joints"] == (B if kind == "mirrored" else 0)


@pytest.mark.parametrize("protocol", ["freihand", "ho3d"])
def test_equals_the_official_arithmetic(protocol):
    pj, pv, gj, gv = hands()
    pj[2] *= [-1, 1, 1]  # the joints of one hand are mirrored, and the mesh of another
    pv[3] *= [1, -1, 1]
    pv[4] = gv[4] + 0.004 / np.sqrt(3)  # close before the alignment, so that no F-score is trivially 0
    table = metrics.evaluate_hands(pj, pv, gj, gv, protocol)
    check(table, freihand_expected(pj, pv, gj, gv))
    assert (table["count"], table["reflected_joints"], table["reflected_vertices"]) == (B, 1, 1)
    mean, area = loop_measures(loop_points(gj, each(loop_sc_tr, gj, pj)))
    check(table, {"sc_tr_mpjpe_mm": mean * 1000, "auc_joints_sc_tr": area})
    area = loop_measures(loop_points(gj, each(loop_sc_tr, gj, pj)), 0.02, 0.05, 15)[1]
    check(table, {"auc_joints_sc_tr_20_50": area})


def test_dexycb_skips_frames_without_a_hand_and_aligns_millimetres():
    pj, _, gj, _ = hands(9)
    gj[[1, 5]] = -1
    table = metrics.evaluate_hands(pj, None, gj, None, "dexycb")
    keep = [i for i in range(9) if i not in (1, 5)]
    pred, gt = pj[keep] * 1000, gj[keep] * 1000
    rows = {"absolute": loop_points(gt, pred),
            "root-relative": loop_points(gt - gt[:, :1], pred - pred[:, :1]),
            "procrustes": loop_points(gt, each(loop_align, gt, pred))}
    scores = metrics.official_scores(table, "dexycb")
    for name, errors in rows.items():
        mean, area = loop_measures(errors, 0, 50)
        check(scores, {f"{name} MPJPE (mm)": mean, f"{name} AUC": area})
    check(table, {"mpjpe_mm": loop_measures(rows["root-relative"])[0], "count": 7})
    assert not any("mpvpe" in key or "vertices" in key or key.startswith("f_") for key in table)


def test_assemblyhands_uses_valid_joints_and_means_per_joint_and_side():
    pj, _, gj, _ = hands(12)
    missing = np.random.default_rng(3).random((12, J)) < 0.3
    missing[:, 0] = False  # the wrist is there, one joint is never labelled
    missing[:, 7] = True
    gj[missing] = np.nan
    side = np.arange(12) % 2
    side[:5] = 0
    rooted = [(gj - gj[:, :1])[side == s] for s in (0, 1)], [(pj - pj[:, :1])[side == s] for s in (0, 1)]
    lists = [point for g, p in zip(*rooted, strict=True) for point in loop_points(g, p)]
    table = metrics.evaluate_hands(pj, None, gj, None, "assemblyhands", side=side)
    check(table, {"mpjpe_mm": loop_measures(lists)[0] * 1000})
    table = metrics.evaluate_hands(pj, None, gj, None, "assemblyhands")
    check(table, {"mpjpe_mm": loop_measures(loop_points(gj - gj[:, :1], pj - pj[:, :1]))[0] * 1000})
    aligned = pj.copy()
    for i in range(12):
        keep = ~missing[i]
        aligned[i, keep] = loop_align(gj[i, keep], pj[i, keep])
    check(table, {"pa_mpjpe_mm": loop_measures(loop_points(gj, aligned))[0] * 1000})


def test_assemblyhands_keeps_the_joints_of_a_hand_whose_wrist_is_doubtful():
    pj, _, gj, _ = hands()
    valid = np.ones((B, J), bool)
    valid[3, 0] = False  # its coordinates are known, so the other twenty joints are still scored against them
    rooted = gj - gj[:, :1]
    rooted[3, 0] = np.nan
    expected = loop_measures(loop_points(rooted, pj - pj[:, :1]))[0] * 1000
    check(metrics.evaluate_hands(pj, None, gj, None, "assemblyhands", valid=valid), {"mpjpe_mm": expected})


def test_assemblyhands_leaves_out_hands_of_which_too_little_is_valid():
    """The toolkit takes no hand with fewer than ten valid joints; InterHand2.6M's script takes all."""
    pj, _, gj, _ = hands(9)
    valid = np.zeros((9, J), bool)
    for i, number in enumerate((21, 3, 10, 9, 21, 21, 0, 12, 11)):
        valid[i, J - number:] = True
    rooted = gj - gj[:, :1], pj - pj[:, :1]
    for protocol, fewest in (("assemblyhands", 10), ("interhand", 0)):
        expected = [[] for _ in range(J)]
        for i in range(9):
            if sum(valid[i]) < fewest:
                continue
            for j in range(J):
                if valid[i, j]:
                    expected[j].append(np.sqrt(np.sum((rooted[0][i, j] - rooted[1][i, j]) ** 2)))
        table = metrics.evaluate_hands(pj, None, gj, None, protocol, valid=valid)
        check(table, {"mpjpe_mm": 1000 * np.mean([np.mean(point) for point in expected if point]),
                      "count": 6 if fewest else 9})
        assert metrics.official_scores(table, protocol) == {"mpjpe_mm": table["mpjpe_mm"]}
    gaps = np.where(valid[..., None], gj, np.nan)  # the same, told by the labels themselves
    assert metrics.evaluate_hands(pj, None, gaps, None, "assemblyhands")["count"] == 6
    with pytest.raises(ValueError, match="fewer than 10 valid joints"):
        metrics.evaluate_hands(pj[1:2], None, gj[1:2], None, "assemblyhands", valid=valid[1:2])


def test_two_joints_fix_no_rotation():
    """A hand with two labelled joints has no aligned error; the mean leaves it out. With three it has one."""
    pj, _, gj, _ = hands()
    gj[2, 2:] = np.nan
    gj[4, 3:] = np.nan
    errors = metrics.per_sample_errors(pj, None, gj, None, "interhand")
    assert np.isnan(errors["pa_joints"][2]).all() and not errors["reflected_joints"][2]
    assert np.isfinite(errors["pa_joints"][4, :3]).all()
    assert np.isfinite(errors["root_joints"][2, :2]).all()
    assert np.isfinite(metrics.summarise(errors, "interhand")["pa_mpjpe_mm"])


def test_joints_and_vertices_are_aligned_by_separate_fits():
    _, _, gj, gv = hands()
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    turn *= np.sign(np.linalg.det(turn))
    table = metrics.evaluate_hands(0.7 * gj @ turn + 1, 1.3 * gv @ turn.T - 2, gj, gv, "freihand")
    assert table["pa_mpjpe_mm"] < 1e-4 and table["pa_mpvpe_mm"] < 1e-4 and table["f_5"] == 1
    assert table["pa_mpjpe_noreflect_mm"] < 1e-4 and table["reflected_joints"] == 0


def test_a_mirrored_hand_is_reflected_only_when_asked():
    _, _, gj, gv = hands()
    mirrored = gj * [-1, 1, 1]
    aligned = [metrics.procrustes(mirrored, gj, reflect=r) for r in (True, False)]
    error = [1000 * np.linalg.norm(a - gj, axis=-1).mean() for a in aligned]
    assert error[0] < 1e-4 and error[1] > 10
    noisy = gj + np.random.default_rng(0).normal(0, 0.01, gj.shape)
    reflected, turned = (metrics.procrustes(noisy, gj, reflect=r) for r in (True, False))
    np.testing.assert_allclose(reflected, turned, atol=1e-12)
    table = metrics.evaluate_hands(mirrored, gv, gj, gv, "freihand")
    assert table["reflected_joints"] == B and table["reflected_vertices"] == 0
    assert table["pa_mpjpe_mm"] < 1e-4 and table["pa_mpjpe_noreflect_mm"] == pytest.approx(error[1], abs=1e-9)


def test_procrustes_takes_one_hand_and_float32():
    pj, _, gj, _ = hands()
    one = metrics.procrustes(pj[0].astype(np.float32), gj[0].astype(np.float32))
    assert one.shape == (J, 3) and one.dtype == np.float64
    np.testing.assert_allclose(one, loop_align(gj[0], pj[0], reflect=False), atol=1e-6)
    with pytest.raises(ValueError, match="sample 2 "):
        metrics.procrustes(np.where(np.arange(B)[:, None, None] == 2, np.nan, pj), gj)
    with pytest.raises(ValueError, match="one shape"):
        metrics.procrustes(pj, gj[:, :5])


@pytest.mark.parametrize("constant", [0.0, 0.5])
def test_a_constant_prediction_collapses_to_the_centroid(constant):
    _, _, gj, gv = hands()
    table = metrics.evaluate_hands(np.full_like(gj, constant), np.full_like(gv, constant), gj, gv, "ho3d")
    check(table, {"pa_mpjpe_mm": 1000 * np.linalg.norm(gj - gj.mean(1, keepdims=True), axis=-1).mean(),
                  "sc_tr_mpjpe_mm": 1000 * np.linalg.norm(gj - gj[:, :1], axis=-1).mean()})
    assert np.isfinite(list(table.values())).all() and table["reflected_joints"] == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_nan_in_a_prediction_is_refused_with_its_index(bad, which):
    arrays = list(hands())
    arrays[which][4, 3, 1] = bad
    with pytest.raises(ValueError, match="sample 4 "):
        metrics.evaluate_hands(*arrays, "freihand")


def test_other_mistakes_are_refused():
    pj, pv, gj, gv = hands()
    with pytest.raises(ValueError, match=r"predicted joints have shape \(6, 21, 3\) but \(7, 21, 3\)"):
        metrics.evaluate_hands(pj[:6], pv[:6], gj, gv, "freihand")
    with pytest.raises(ValueError, match="predicted vertices have shape"):
        metrics.evaluate_hands(pj, pv[:, :700], gj, gv, "freihand")
    with pytest.raises(ValueError, match="freihand, ho3d, dexycb, assemblyhands, interhand"):
        metrics.evaluate_hands(pj, pv, gj, gv, "kitti")
    with pytest.raises(ValueError, match="empty"):
        metrics.evaluate_hands(pj[:0], None, gj[:0], None, "freihand")
    gj[5, 2] = np.nan
    with pytest.raises(ValueError, match="sample 5 .*assemblyhands"):
        metrics.evaluate_hands(pj, pv, gj, gv, "freihand")


def test_perfect_prediction_and_the_two_comparisons():
    _, _, gj, gv = hands()
    table = metrics.evaluate_hands(gj, gv, gj, gv, "freihand")
    assert table["mpjpe_mm"] == 0 and table["pa_mpvpe_mm"] < 1e-4
    ones = [key for key in table if key.startswith(("f_", "auc_"))]
    assert len(ones) > 10 and all(table[key] == pytest.approx(1, abs=1e-12) for key in ones)
    # Exactly on a threshold: PCK counts it (<=), the F-score does not (<).
    thresholds, share = metrics.pck_curve(np.array([[0.05]]))
    assert share[-1] == 1 and share[:-1].sum() == 0 and thresholds[-1] == 0.05
    at, inside = np.array([[[0.005, 0, 0]]]), np.array([[[0.0049, 0, 0]]])
    assert metrics.f_score(at, np.zeros((1, 1, 3)))[0].tolist() == [0, 1]
    assert metrics.f_score(inside[0], np.zeros((1, 3))).tolist() == [1, 1]


@pytest.mark.parametrize("away", [0, 3, 1000])
def test_f_score_is_exact_where_distances_lie_on_a_threshold(away):
    """Points whose neighbours lie at a threshold within 1e-10 m, near the origin and far away from it or from
    the other set: float32 cannot tell on which side."""
    rng = np.random.default_rng(0)
    direction = rng.normal(size=(4, 130, 3))
    direction /= np.linalg.norm(direction, axis=2, keepdims=True)
    gt = 0.1 * rng.normal(size=(4, 130, 3)) + [0, 0, away]
    length = rng.choice(metrics.F_THRESHOLDS, (4, 130, 1)) + 1e-10 * rng.choice([-1, 1], (4, 130, 1))
    pred = (gt + direction * length)[:, :101]
    pred[3] += [0, 0, away]
    found = metrics.f_score(pred, gt)
    expected = [[loop_f(g, p, t) for t in metrics.F_THRESHOLDS] for g, p in zip(gt, pred, strict=True)]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert (found[:3] > 0.1).all() and (found[:3, 0] < 0.9).all()


@pytest.mark.parametrize("protocol", metrics.PROTOCOLS)
def test_the_unaligned_f_score_is_of_the_protocols_placement(protocol):
    """A perfect hand, 20 mm to the side: only minus the wrist do all vertices meet."""
    _, _, gj, gv = hands()
    table = metrics.evaluate_hands(gj + [0.02, 0, 0], gv + [0.02, 0, 0], gj, gv, protocol)
    rooted = metrics.PROTOCOLS[protocol] == "root"
    assert (table["f_5_unaligned"] == 1) == rooted and table["f_5"] == 1
    assert (table["mpvpe_mm"] < 1e-9) == rooted


def test_scores_file_is_in_centimetres():
    _, pv, gj, gv = hands()
    table = metrics.evaluate_hands(gj + [0.03, 0, 0.04], pv, gj, gv, "freihand")  # 50 mm off
    scores = metrics.official_scores(table, "freihand")
    assert table["mpjpe_mm"] == pytest.approx(50) and scores["xyz_mean3d"] == pytest.approx(5)
    assert scores["f_al_score_5"] == table["f_5"] and scores["f_score_5"] == table["f_5_unaligned"]
    assert list(scores) == ["xyz_mean3d", "xyz_auc3d", "xyz_al_mean3d", "xyz_al_auc3d", "mesh_mean3d",
                            "mesh_auc3d", "mesh_al_mean3d", "mesh_al_auc3d", "f_score_5", "f_al_score_5",
                            "f_score_15", "f_al_score_15"]
    ho3d = metrics.official_scores(table, "ho3d")
    assert {"xyz_procrustes_al_mean3d", "xyz_scale_trans_al_auc3d"} < set(ho3d)


def test_per_sample_errors_average_to_the_table():
    arrays = hands(20)
    errors = metrics.per_sample_errors(*arrays, "freihand")
    table = metrics.evaluate_hands(*arrays, "freihand")
    assert errors["pa_joints"].shape == (20, J)
    assert errors["pa_vertices"].shape == (20,) and errors["f"].shape == (20, 2)
    check(table, {"pa_mpjpe_mm": 1000 * errors["pa_joints"].mean(), "f_15": errors["f"][:, 1].mean(),
                  "auc_joints": metrics.pck_auc(errors["pa_joints"]),
                  "root_mpjpe_mm": 1000 * errors["root_joints"].mean()})
    count = metrics.CHUNK + 3  # more hands than one chunk: the same numbers for each
    many = metrics.per_sample_errors(*(np.resize(a, (count, *a.shape[1:])) for a in arrays), "freihand")
    np.testing.assert_allclose(many["pa_vertices"], np.resize(errors["pa_vertices"], count))
