"A CALVIN split read lazily is the split read whole: on a real recording, on our own with several scenes, across processes, and after a crash."
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ENV

from defi_nb.sim.calvin_tasks import initial_obs
from defi_nb.data.calvin import covered_rows, read_index
from defi_nb.data.record import finish_split, write_segment
from defi_nb.data.calvin import PLAY, open_calvin, order_blocks
from defi_nb.core.video import resize_image
from defi_nb.data.episodes import Frames, Window, WindowDataset, frames_identity, take_fraction
from defi_nb.sim.layout import layout_of

REAL = Path(__file__).resolve().parents[2]/"shared"/"data"/"calvin_mini"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Six recordings in four scenes, with gaps in their numbers and windows that overlap."
    root, rng = tmp_path_factory.mktemp("play"), np.random.default_rng(0)
    for start, n, scene in ((0, 40, "B"), (60, 25, "B"), (100, 30, "C"), (140, 12, "A"), (160, 33, "A"), (900, 20, "D")):
        pictures = rng.integers(0, 256, (n, 24, 24, 3)).astype(np.uint8)
        windows = [Window(2, 11, "open_drawer", "open the drawer"), Window(8, n - 1, "turn_on_led", "turn on the light")]
        write_segment(root/"training", start, dict(rel_actions=rng.uniform(-1, 1, (n, 7)), robot_obs=rng.normal(size=(n, 15)),
            scene_obs=rng.normal(size=(n, 24)), rgb_static=pictures, rgb_gripper=pictures[:, :16, :16]), scene, windows)
    finish_split(root/"training")
    return root


def by_numpy(folder, size=None, views=("static", "gripper"), annotations="lang_annotations", windows_only=False, scene=""):
    "A split in memory, each frame read by numpy alone."
    root, ids, segments, windows, _ = read_index(folder, annotations=annotations, scene=scene)
    if windows_only: ids, segments, windows = covered_rows(ids, segments, windows)
    frames = [dict(np.load(root/f"episode_{i:07d}.npz")) for i in ids]
    fit = lambda x: x if size is None else resize_image(x, size)
    vectors = (np.stack([f[k] for f in frames]).astype(np.float32) for k in ("rel_actions", "robot_obs", "scene_obs"))
    return Frames({v: np.stack([fit(f[f"rgb_{v}"]) for f in frames]) for v in views}, *vectors, segments, windows)


def equal(lazy, whole, rows):
    for view, pictures in whole.video.items(): assert (lazy.video[view][rows] == pictures[rows]).all()
    for key in ("action", "robot_obs", "scene_obs"): assert (getattr(lazy, key)[rows] == getattr(whole, key)[rows]).all()
    assert lazy.windows == whole.windows and (lazy.segments == whole.segments).all() and len(lazy) == len(whole)


@pytest.mark.parametrize("kw", [{}, dict(size=16), dict(windows_only=True), dict(annotations=None), dict(views=("gripper",))])
def test_equals_what_is_read_whole(folder, tmp_path, kw):
    lazy, whole, rng = open_calvin(folder, cache=tmp_path, **kw), by_numpy(folder, **kw), np.random.default_rng(0)
    for rows in (7, -1, slice(3, 50, 4), rng.integers(0, len(whole), (4, 6)), np.arange(len(whole))): equal(lazy, whole, rows)


def test_samples_are_the_same(folder):
    lazy, whole = (WindowDataset(f, f.windows, offsets=(0, 3, 9), chunk=10, video=True, min_left=3) for f in (open_calvin(folder, size=16), by_numpy(folder, size=16)))
    order = np.random.default_rng(0).permutation(len(whole))
    for context in ("fork", "spawn"):
        loader = torch.utils.data.DataLoader(lazy, sampler=np.array_split(order, 5), batch_size=None, num_workers=1, multiprocessing_context=context)
        for part, batch in zip(np.array_split(order, 5), loader):
            there = whole[part]
            assert batch.text == there.text and all(torch.equal(getattr(batch, k), getattr(there, k)) for k in ("video", "action", "proprio"))


def test_the_real_recording():
    if not REAL.exists(): pytest.skip("no recording of the real environment here")
    lazy, whole = open_calvin(REAL, scene="D"), by_numpy(REAL, scene="D")
    equal(lazy, whole, np.arange(len(whole)))
    equal(open_calvin(REAL, scene="D", size=64), by_numpy(REAL, scene="D", size=64), [0, 100, 266])
    with np.load(REAL/"training/episode_0000060.npz") as z:
        assert (lazy.video["static"][60] == z["rgb_static"]).all() and (lazy.action[60] == z["rel_actions"].astype(np.float32)).all()
        assert (open_calvin(REAL, size=64).video["static"][60] == resize_image(z["rgb_static"], 64)).all()
    play = open_calvin(REAL, scene="D", play=8).windows
    assert {w.task for w in play} == {w.task for w in whole.windows} | {PLAY} or not any(w.task == PLAY for w in play)


def test_windows_by_scene_task_and_share(folder):
    whole = by_numpy(folder).windows
    assert [w.scene for w in open_calvin(folder, scenes="AC", tasks=("open_drawer",)).windows] == ["C", "A", "A"]
    assert open_calvin(folder, data_frac=.5).windows == take_fraction(whole, .5)
    covered = np.zeros(160, bool)
    for w in whole: covered[w.start:w.end + 1] = True
    lazy = open_calvin(folder, play=2, play_text="play")
    free = [w for w in lazy.windows if w.task == PLAY]
    assert free and not any(covered[w.start:w.end + 1].any() for w in free) and {w.text for w in free} == {"play"}
    segment = np.searchsorted(lazy.segments[:, 0], [[w.start, w.end] for w in lazy.windows], side="right")
    assert (segment[:, 0] == segment[:, 1]).all() # none crosses from one recording into another
    assert {(w.scene, s) for w, s in zip(lazy.windows, segment[:, 0] - 1)} <= set(zip("BBCAAD", range(6)))


def test_blocks_have_one_order_in_all_scenes():
    order = {"A": "pink blue red", "B": "red blue pink", "C": "blue red pink", "D": "red blue pink"} # of CALVIN
    assert {s: " ".join(c for c, _ in layout_of(s).blocks) for s in "ABCD"} == order
    state = dict(led=0, lightbulb=0, slider="left", drawer="closed", red_block="table", blue_block="slider_right", pink_block="slider_left", grasped=0)
    for colours in (("red", "blue", "pink"), ("pink", "red", "blue")):
        for s in "ABCD": # the red block alone stands on the table, the others in the cabinet
            red, blue, pink = (order_blocks(initial_obs(state, layout_of(s))[1], s, colours)[8 + 6*colours.index(c)] for c in ("red", "blue", "pink"))
            assert blue == pink != red


def test_only_what_is_needed_is_touched(folder, tmp_path):
    here = tmp_path/"some"
    shutil.copytree(folder, here)
    window = by_numpy(folder).windows[4]
    numbers = np.concatenate([np.arange(a, a + n) for a, n in ((0, 40), (60, 25), (100, 30), (140, 12), (160, 33), (900, 20))])
    keep = {f"episode_{numbers[r]:07d}.npz" for r in range(window.start, window.end + 1)} | {f"episode_{numbers[2]:07d}.npz"}
    for path in here.glob("training/episode_*.npz"):
        if path.name not in keep: path.unlink()
    lazy = open_calvin(here)
    batch = WindowDataset(lazy, [lazy.windows[4]], views=("static",), offsets=(0, 2), chunk=10, video=True)[:]
    assert len(batch) == len(window)
    with pytest.raises(FileNotFoundError, match="episode_0000008.npz is missing"): WindowDataset(lazy, [lazy.windows[1]], video=True)[0]


FILL = """
import sys
from defi_nb.data.calvin import open_calvin
frames = open_calvin(sys.argv[1], cache=sys.argv[2], n_workers=1)
print("ready", flush=True)
frames.action[:]
"""


def test_a_pack_survives_kills_and_is_shared(folder, tmp_path):
    "Killed while it fills, then filled by two processes at once: every row is right, and the frames are not needed again."
    whole = by_numpy(folder)
    fill = [sys.executable, "-c", FILL, str(folder), str(tmp_path/"cache")]
    killed = subprocess.Popen(fill, env=ENV, stdout=subprocess.PIPE)
    killed.stdout.readline()
    killed.kill()
    killed.wait()
    lazy = open_calvin(folder, cache=tmp_path/"cache")
    assert (lazy.action[::3] == whole.action[::3]).all()
    for p in [subprocess.Popen(fill, env=ENV, stdout=subprocess.DEVNULL) for _ in range(2)]: assert p.wait() == 0
    lazy.action.pack.files.root = tmp_path/"away"
    again = pickle.loads(pickle.dumps(lazy))
    for key in ("action", "robot_obs", "scene_obs"): assert (np.asarray(getattr(again, key)) == getattr(whole, key)).all()
    for view, images in whole.video.items(): assert (again.video[view][:] == images).all() # they were kept with the vectors
    rng, kept = np.random.default_rng(0), sorted((tmp_path/"cache").glob("*.bin"))
    assert [p.name.split("-")[0] for p in kept] == ["gripper", "static", "vectors"]
    for path in kept:
        data = bytearray(path.read_bytes())
        for at in rng.integers(0, len(data), 20): data[at] ^= 1 << rng.integers(8) # a disk that forgets
        path.write_bytes(data)
    mended = open_calvin(folder, cache=tmp_path/"cache")
    equal(mended, whole, np.arange(len(whole)))


def test_images_are_kept_up_to_a_bound(folder, tmp_path):
    whole = by_numpy(folder)
    for keep, files in ((1e-9, 1), (1., 3)):
        lazy = open_calvin(folder, cache=tmp_path/str(keep), keep_gb=keep)
        equal(lazy, whole, np.arange(len(whole)))
        assert len(list((tmp_path/str(keep)).glob("*.bin"))) == files


def test_another_recording_gets_another_pack(folder, tmp_path):
    here = tmp_path/"copy"
    shutil.copytree(folder, here)
    first = open_calvin(here, cache=tmp_path/"cache").action[5]
    n, rng = 40, np.random.default_rng(9)
    pictures = rng.integers(0, 256, (n, 24, 24, 3)).astype(np.uint8)
    write_segment(here/"training", 0, dict(rel_actions=rng.uniform(-1, 1, (n, 7)), robot_obs=rng.normal(size=(n, 15)), scene_obs=rng.normal(size=(n, 24)),
                  rgb_static=pictures, rgb_gripper=pictures[:, :16, :16]), "B", [Window(2, 11, "open_drawer", "open the drawer")])
    finish_split(here/"training")
    assert (open_calvin(here, cache=tmp_path/"cache").action[5] != first).any()


@pytest.mark.parametrize("keep_gb", [0., 8.])
def test_a_replaced_frame_is_read_again(folder, tmp_path, keep_gb):
    "One of all frames, with an image of another file's and the same vectors: it alone is read again, and what depends on the recording's images is of another key."
    here, cache = Path(shutil.copytree(folder, tmp_path/"copy")), tmp_path/"cache"
    first = open_calvin(here, cache=cache, keep_gb=keep_gb, size=16)
    before, key = first.video["static"][:], frames_identity(first)
    assert key == frames_identity(open_calvin(here, cache=cache, keep_gb=keep_gb, size=16)) == frames_identity(open_calvin(folder, size=16)) # a copy with the files' times
    frame = dict(np.load(here/"training/episode_0000017.npz"))
    np.savez(here/"training/episode_0000017.npz", **frame | dict(rgb_static=255 - frame["rgb_static"]))
    again = open_calvin(here, cache=cache, keep_gb=keep_gb, size=16)
    if keep_gb: assert np.flatnonzero(again.action.pack.checks(np.arange(160), again.action.pack.kept(np.arange(160))[:, :-1]) != again.action.pack.kept(np.arange(160))[:, -1]).tolist() == [17]
    assert np.flatnonzero((again.video["static"][:] != before).any((1, 2, 3))).tolist() == [17]
    assert (again.video["static"][17] == resize_image(255 - frame["rgb_static"], 16)).all()
    assert frames_identity(again) != key
