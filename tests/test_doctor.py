"The doctor finds each fault in sets that were damaged on purpose, names its place, and finds none in sound ones."
import csv
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BIN, ENV

from defi_nb.doctor import calvin as check_calvin
from defi_nb.core.npz import write_npz
from defi_nb.data.record import finish_split, write_segment
from defi_nb.core.video import fake_video, write_video
from defi_nb.doctor.examine import NOTE, dataset_state, examine, require_sound
from defi_nb.data.episodes import Reading, Window
from defi_nb.data.robot_dataset import measure_scale
from defi_nb.run.cli import main
from defi_nb.data.load import DatasetRef, open_dataset
from defi_nb.data.clips import scan_latent

FIXTURES, REAL = Path(__file__).parent/"fixtures", Path(__file__).resolve().parents[2]/"shared"/"data"
real = pytest.mark.skipif(not REAL.exists(), reason="the real recordings are not beside this checkout")


class Bomb:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.system, (f"touch {self.path}",)


# ---- sound sets of each format, small

def make_calvin(folder, demos=5, n=24):
    rng = np.random.default_rng(0)
    for i in range(demos):
        action = np.clip(rng.normal(0, .4, (n, 7)), -1, 1)
        action[:, 6] = np.where(np.arange(n) < n//2, 1, -1)
        robot = np.concatenate([np.cumsum(action[:, :6]*.008, 0), np.clip(.04 + .01*np.cumsum(action[:, 6:], 0), 0, .08), rng.uniform(-1, 1, (n, 8))], 1)
        pictures = dict(rgb_static=fake_video(n, 32, start=10*i), rgb_gripper=fake_video(n, 16, start=10*i))
        window = Window(0, n - 1, *[("open_drawer", "open the drawer"), ("close_drawer", "push it shut")][i % 2])
        write_segment(folder/"training", 100*i, dict(rel_actions=action, robot_obs=robot, scene_obs=rng.uniform(0, .2, (n, 24)), **pictures), "D", [window])
    finish_split(folder/"training")


def make_release(folder, clips=4, n=20):
    for i in range(clips):
        write_video(folder/f"videos/train/{i}/rgb.mp4", fake_video(n, start=30*i), hz=5, g=10, bf=0)
        note = dict(texts=[f"move cup {i}"], videos=[dict(video_path=f"videos/train/{i}/rgb.mp4")], latent_videos=[dict(latent_video_path=f"latent_videos/train/{i}/0.pt")],
                    state=np.zeros((n, 7)).tolist(), action=np.random.default_rng(i).normal(0, .1, (n - 1, 7)).tolist())
        for path in (folder/f"annotation/train/{i}.json", folder/f"latent_videos/train/{i}/0.pt"): path.parent.mkdir(parents=True, exist_ok=True)
        (folder/f"annotation/train/{i}.json").write_text(json.dumps(note))
        torch.save(torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(i))*.7, folder/f"latent_videos/train/{i}/0.pt")


def make_own(folder, episodes=4, n=30, hz=10):
    (folder/"actions").mkdir(parents=True)
    for i in range(episodes):
        write_video(folder/f"videos/ep{i}.mp4", fake_video(n, start=30*i), hz=hz, g=10, bf=0)
        x = np.random.default_rng(i).normal(0, .1, (n, 3))
        rows = [["timestamp", "x", "y", "gripper"], *([f"{t/hz:.3f}", f"{a:.4f}", f"{b:.4f}", int(c > 0)] for t, (a, b, c) in enumerate(x))]
        with open(folder/f"actions/ep{i}.csv", "w", newline="") as file: csv.writer(file).writerows(rows)
    (folder/"captions.csv").write_text("episode,text\n" + "".join(f"ep{i},stack cup {i}\n" for i in range(episodes)))


def make_videos(folder, clips=4, n=24):
    for i in range(clips): write_video(folder/f"{i}.mp4", fake_video(n, start=30*i), hz=10, g=10, bf=0)
    (folder/"captions.csv").write_text("file_name,text\n" + "".join(f"{i}.mp4,wave hand {i}\n" for i in range(clips)))


def make_something(folder, clips=3, n=20):
    for i in range(clips): write_video(folder/f"20bn-something-something-v2/{i}.webm", fake_video(n, start=30*i), hz=12, codec="libvpx-vp9", g=20)
    (folder/"labels").mkdir()
    (folder/"labels/train.json").write_text(json.dumps([dict(id=str(i), label=f"moving cup {i} up", template="Moving [something] up", placeholders=["cup"]) for i in range(clips)]))


def make_ego4d(folder, clips=3, n=50):
    told = {}
    for i in range(clips):
        write_video(folder/f"clips/uid{i}.mp4", fake_video(n, start=30*i), hz=10, g=10, bf=0)
        told[f"uid{i}"] = dict(narration_pass_1=dict(narrations=[dict(timestamp_sec=t, narration_text=f"#C C turns knob {i}{t:.0f}") for t in (1., 3.)]))
    (folder/"narration.json").write_text(json.dumps(told))


def unpacked(name):
    def make(folder):
        with zipfile.ZipFile(FIXTURES/f"{name}.zip") as z: z.extractall(folder)
    return make


MAKE = dict(calvin=make_calvin, release=make_release, own=make_own, videos=make_videos, something=make_something, ego4d=make_ego4d, lerobot_v21=unpacked("lerobot_v21"), lerobot_v30=unpacked("lerobot_v30"), rlds=unpacked("rlds"))
FORMAT = dict(lerobot_v21="lerobot", lerobot_v30="lerobot")


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    for name, make in MAKE.items(): make(root/name)
    return root


def folder_of(root, name): return root/name/"toy_robot" if name == "rlds" else root/name


@pytest.mark.parametrize("everything", [False, True], ids=["sample", "everything"])
@pytest.mark.parametrize("name", MAKE)
def test_no_error_in_sound_sets(sets, name, everything):
    report = examine(folder_of(sets, name), everything, seconds=5, hz=10)
    assert (report.format, report.of("error"), report.sound) == (FORMAT.get(name, name), [], True), str(report)
    if name in ("calvin", "release", "own", "videos", "something", "ego4d"): assert not report.of("warning"), str(report)
    assert report.facts["size"] and report.lengths and all(done == total for done, total in report.looked.values())


@real
@pytest.mark.parametrize("name,format", [("calvin_mini", "calvin"), ("calvin_mini/training", "calvin"), ("real_clips/bridge", "release"), ("real_clips/rt1", "release")])
def test_no_fault_in_real_recordings(name, format):
    report = examine(REAL/name, seconds=10)
    assert (report.format, report.of("error") + report.of("warning")) == (format, []), str(report)
    assert "reading speed" in report.facts and len(report.texts) == 4 and report.actions


# ---- damages, one at a time

def frame(f, i): return f/f"training/episode_{i:07d}.npz"
def rewrite(f, i, **changes): write_npz(frame(f, i), dict(np.load(frame(f, i))) | changes)
def cut(path): path.write_bytes(path.read_bytes()[:path.stat().st_size//2])
def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def every(f, change):
    for path in sorted((f/"training").glob("episode_*.npz")): write_npz(path, change(dict(np.load(path))))


def annotations(f, change):
    path = f/"training/lang_annotations/auto_lang_ann.npy"
    data = np.load(path, allow_pickle=True).item()
    change(data)
    np.save(path, data)


def same_frames(f): # the fifth recording is the first once more
    for i in range(24): shutil.copy(frame(f, i), frame(f, 400 + i))


def note(f, i, **changes): (f/f"annotation/train/{i}.json").write_text(json.dumps(json.loads((f/f"annotation/train/{i}.json").read_text()) | changes))


def with_nan(f):
    actions = json.loads((f/"annotation/train/2.json").read_text())["action"]
    actions[5][1] = float("nan")
    note(f, 2, action=actions)


def latents(f, scale):
    for path in f.rglob("*.pt"): torch.save(torch.load(path, weights_only=True)*scale, path)


def columns(f, change): # of the second episode's table
    path = f/"actions/ep1.csv"
    with open(path, newline="") as file: rows = list(csv.reader(file))
    with open(path, "w", newline="") as file: csv.writer(file).writerows(change(rows))


def stamps(times): return lambda f: columns(f, lambda rows: [rows[0], *([str(times(i)), *r[1:]] for i, r in enumerate(rows[1:]))])
def constant(f): columns(f, lambda rows: [rows[0], *([r[0], "0.1", "0.1", "1"] for r in rows[1:])])


def info(f, **changes):
    path = f/"meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def first(f, pattern): return sorted(f.rglob(pattern))[0]
def put(path, value): np.save(path, value, allow_pickle=True)
def bomb(f, name): put(f/name, {"a": Bomb(f/"executed")})
def pickled(f, name): (f/name).write_bytes(pickle.dumps(Bomb(f/"executed")))


DAMAGES = [ # set, what is done to it, severity, what the finding must say, and where
    ("calvin", "truncated npz", lambda f: cut(frame(f, 105)), "error", "can't be read", "episode_0000105.npz"),
    ("calvin", "missing frame", lambda f: frame(f, 307).unlink(), "error", "frames are missing", "episode_0000307.npz"),
    ("calvin", "NaN action", lambda f: rewrite(f, 210, rel_actions=np.full(7, np.nan)), "error", "action is not finite", "episode_0000210.npz"),
    ("calvin", "infinite state", lambda f: rewrite(f, 210, robot_obs=np.full(15, np.inf)), "error", "robot_obs is not finite", "episode_0000210.npz"),
    ("calvin", "pictures in float", lambda f: rewrite(f, 11, rgb_static=np.zeros((32, 32, 3), np.float32)), "error", "wrong kind", "episode_0000011.npz"),
    ("calvin", "picture of another size", lambda f: rewrite(f, 11, rgb_gripper=np.zeros((8, 8, 3), np.uint8)), "error", "wrong kind", "episode_0000011.npz"),
    ("calvin", "actions in whole numbers", lambda f: every(f, lambda x: x | dict(rel_actions=x["rel_actions"].astype(int))), "error", "wrong kind", "episode_0000000.npz"),
    ("calvin", "actions in metres", lambda f: every(f, lambda x: x | dict(rel_actions=x["rel_actions"]*np.array([.02]*3 + [.05]*3 + [1]))), "error", "look like metres", "rows"),
    ("calvin", "actions of 0 to 255", lambda f: every(f, lambda x: x | dict(rel_actions=x["rel_actions"]*127 + 128)), "error", "outside [-1, 1]", "episode_"),
    ("calvin", "no actions", lambda f: every(f, lambda x: x | dict(rel_actions=np.zeros(7))), "error", "never change", "x"),
    ("calvin", "a dead number", lambda f: every(f, lambda x: x | dict(rel_actions=x["rel_actions"]*[1, 0, 1, 1, 1, 1, 1])), "warning", "never change", "y"),
    ("calvin", "gripper turned around", lambda f: every(f, lambda x: x | dict(rel_actions=x["rel_actions"]*[1, 1, 1, 1, 1, 1, -1])), "warning", "opens when commanded to close", "episode_"),
    ("calvin", "black images", lambda f: every(f, lambda x: x | dict(rgb_static=x["rgb_static"]*0)), "error", "black images", "episode_"),
    ("calvin", "the same image", lambda f: every(f, lambda x: x | dict(rgb_gripper=fake_video(1, 16)[0])), "error", "same image", "training"),
    ("calvin", "no gripper camera", lambda f: every(f, lambda x: {k: v for k, v in x.items() if k != "rgb_gripper"}), "warning", "a camera is missing", "episode_"),
    ("calvin", "no states", lambda f: every(f, lambda x: {k: v for k, v in x.items() if k != "scene_obs"}), "error", "lack keys", "episode_"),
    ("calvin", "duplicate recording", same_frames, "warning", "the same", "training"),
    ("calvin", "no border between recordings", lambda f: rewrite(f, 12, robot_obs=np.ones(15)*5), "warning", "the hand jumps", "episode_"),
    ("calvin", "empty sentence", lambda f: annotations(f, lambda d: d["language"]["ann"].__setitem__(1, "  ")), "error", "no sentence", "close_drawer"),
    ("calvin", "unknown task", lambda f: annotations(f, lambda d: d["language"]["task"].__setitem__(1, "open_door")), "error", "unknown task", "auto_lang_ann.npy"),
    ("calvin", "repeated windows", lambda f: annotations(f, lambda d: [x.append(x[0]) for x in (d["language"]["ann"], d["language"]["task"], d["info"]["indx"])]), "warning", "windows repeat", "auto_lang_ann.npy"),
    ("calvin", "windows of another split", lambda f: annotations(f, lambda d: d["info"].update(indx=[(9000, 9064)]*5)), "error", "outside the recordings", "auto_lang_ann.npy"),
    ("calvin", "bomb in the annotations", lambda f: bomb(f, "training/lang_annotations/auto_lang_ann.npy"), "error", "import", "auto_lang_ann.npy"),
    ("calvin", "bomb in the scenes", lambda f: bomb(f, "training/scene_info.npy"), "error", "import", "scene_info.npy"),
    ("calvin", "bomb for an index", lambda f: pickled(f, "training/ep_start_end_ids.npy"), "error", "not a plain array", "ep_start_end_ids.npy"),
    ("calvin", "bomb in an object array", lambda f: put(f/"training/ep_start_end_ids.npy", np.array([Bomb(f/"executed")], object)), "error", "not a plain array", "ep_start_end_ids.npy"),
    ("calvin", "no index", lambda f: (f/"training/ep_start_end_ids.npy").unlink(), "error", "no index", "ep_start_end_ids.npy"),
    ("calvin", "recordings overlap", lambda f: np.save(f/"training/ep_start_end_ids.npy", [[0, 23], [20, 23]]), "error", "recordings overlap", "ep_start_end_ids.npy"),
    ("calvin", "other lengths", lambda f: np.save(f/"training/ep_lens.npy", [24, 24]), "warning", "disagree", "ep_lens.npy"),
    ("calvin", "the wrong scene", lambda f: put(f/"training/scene_info.npy", {"calvin_scene_A": [0, 423]}), "warning", "scene is wrong", "scene_info.npy"),
    ("calvin", "an old configuration", lambda f: (f/"training/.hydra/merged_config.yaml").write_text("robot:\n  use_nullspace: false\n"), "warning", "old configuration", "merged_config.yaml"),
    ("calvin", "validation in training", lambda f: [shutil.copytree(f/"training", f/"validation"), [shutil.rmtree(f/"validation/lang_annotations")]], "warning", "same content twice", "validation"),
    ("calvin", "a door that slides too far", lambda f: (put(f/"training/scene_info.npy", {"calvin_scene_C": [0, 423]}), every(f, lambda x: x | dict(scene_obs=x["scene_obs"] + .2))), "warning", "slides farther", "episode_"),
    ("release", "truncated mp4", lambda f: cut(f/"videos/train/1/rgb.mp4"), "error", "can't be used", "1"),
    ("release", "no video", lambda f: (f/"videos/train/1/rgb.mp4").unlink(), "error", "not there", "1.json"),
    ("release", "wrong frame count", lambda f: note(f, 3, state=np.zeros((21, 7)).tolist()), "error", "21 by its annotation", "3"),
    ("release", "annotation cut off", lambda f: cut(f/"annotation/train/0.json"), "error", "is damaged", "0.json"),
    ("release", "path that leads out", lambda f: note(f, 0, videos=[dict(video_path="../../x.mp4")]), "error", "leads out", "0.json"),
    ("release", "empty caption", lambda f: note(f, 1, texts=[""]), "error", "no sentence", "1"),
    ("release", "NaN action", with_nan, "error", "action is not finite", "row 5"),
    ("release", "black clip", lambda f: write_video(f/"videos/train/2/rgb.mp4", fake_video(20)*0, hz=5), "warning", "black images", "2/rgb.mp4"),
    ("release", "frozen clip", lambda f: write_video(f/"videos/train/2/rgb.mp4", fake_video(1).repeat(20, 0), hz=5, qp=0), "warning", "same image", "2/rgb.mp4"),
    ("release", "copied clip", lambda f: shutil.copy(f/"videos/train/1/rgb.mp4", f/"videos/train/2/rgb.mp4"), "warning", "same content twice", "rgb.mp4"),
    ("release", "latents without their factor", lambda f: latents(f, 1/.18215), "error", "another scale", ".pt"),
    ("release", "latents multiplied twice", lambda f: latents(f, .18215), "error", "another scale", ".pt"),
    ("release", "bomb for latents", lambda f: pickled(f, "latent_videos/train/1/0.pt"), "error", "latent_videos/train/1/0.pt", "1"),
    ("release", "latents of fewer frames", lambda f: torch.save(torch.randn(7, 4, 8, 8)*.7, f/"latent_videos/train/1/0.pt"), "error", "7 and 20 frames", "1"),
    ("own", "truncated mp4", lambda f: cut(f/"videos/ep2.mp4"), "error", "can't be read", "ep2.csv"),
    ("own", "no video", lambda f: (f/"videos/ep2.mp4").unlink(), "error", "no video", "ep2.csv"),
    ("own", "NaN action", lambda f: columns(f, lambda rows: [*rows[:5], [rows[5][0], "nan", *rows[5][2:]], *rows[6:]]), "error", "action is not finite", "row 4"),
    ("own", "a word for a number", lambda f: columns(f, lambda rows: [*rows[:5], [*rows[5][:3], "open"], *rows[6:]]), "error", "not a number", "ep1.csv"),
    ("own", "milliseconds", stamps(lambda i: 100*i), "error", "last longer than the video", "ep1"),
    ("own", "time stamps that go back", stamps(lambda i: i/10 if i != 9 else .2), "error", "don't increase", "row 9"),
    ("own", "rows of another rate", lambda f: columns(f, lambda rows: rows[:1] + rows[1::2]), "error", "rates differ", "actions"),
    ("own", "time stamps in minutes", stamps(lambda i: i/600), "error", "rates differ", "actions"),
    ("own", "a video that goes on", lambda f: write_video(f/"videos/ep1.mp4", fake_video(60), hz=10, g=10, bf=0), "warning", "lasts longer than the rows", "ep1"),
    ("own", "one camera for two", lambda f: (f/"videos/ep1").mkdir() or (f/"videos/ep1.mp4").rename(f/"videos/ep1/front.mp4"), "error", "the cameras", "ep1"),
    ("own", "hole in the rows", lambda f: columns(f, lambda rows: rows[:12] + rows[16:]), "warning", "holes in the rows", "ep1"),
    ("own", "constant action", constant, "warning", "same in all rows", "ep1"),
    ("own", "another label", lambda f: edit(f/"actions/ep1.csv", "gripper", "hand"), "error", "other labels", "ep"),
    ("own", "no captions", lambda f: (f/"captions.csv").unlink(), "warning", "no captions", "captions.csv"),
    ("own", "empty caption", lambda f: edit(f/"captions.csv", "stack cup 1", ""), "error", "no sentence", "ep1"),
    ("videos", "truncated mp4", lambda f: cut(f/"1.mp4"), "error", "can't be used", "1.mp4"),
    ("videos", "empty caption", lambda f: edit(f/"captions.csv", "wave hand 1", ""), "error", "no sentence", "1.mp4"),
    ("videos", "odd characters", lambda f: edit(f/"captions.csv", "wave hand 1", "caf\N{LATIN CAPITAL LETTER A WITH TILDE}\N{COPYRIGHT SIGN}"), "warning", "odd characters", "1.mp4"),
    ("videos", "caption of no video", lambda f: edit(f/"captions.csv", "1.mp4", "9.mp4"), "error", "not there", "9.mp4"),
    ("videos", "no captions", lambda f: (f/"captions.csv").unlink(), "error", "no sentence", ".mp4"),
    ("videos", "one frame", lambda f: write_video(f/"1.mp4", fake_video(1), hz=10), "warning", "one frame", "1.mp4"),
    ("videos", "distant key frames", lambda f: write_video(f/"1.mp4", fake_video(150), hz=10, g=250, sc_threshold=0), "warning", "key frames far apart", "1.mp4"),
    ("videos", "uneven rate", lambda f: write_video(f/"1.mp4", fake_video(24), hz=30, times=np.cumsum([40, 300]*12)), "note", "frame rate varies", "1.mp4"),
    ("videos", "hole in time", lambda f: write_video(f/"1.mp4", fake_video(24), hz=30, times=100*np.arange(24) + 5000*(np.arange(24) > 9)), "warning", "holes in time", "1.mp4"),
    ("something", "missing clip", lambda f: (f/"20bn-something-something-v2/1.webm").unlink(), "error", "missing", "1"),
    ("something", "truncated clip", lambda f: cut(f/"20bn-something-something-v2/1.webm"), "error", "1.webm", "1"),
    ("something", "empty label", lambda f: [edit(f/"labels/train.json", old, "") for old in ("moving cup 1 up", "Moving [something] up")], "error", "no sentence", "clip 1"),
    ("something", "list cut off", lambda f: cut(f/"labels/train.json"), "error", "is damaged", "train.json"),
    ("ego4d", "narrations of other videos", lambda f: edit(f/"narration.json", "uid1", "uid9"), "error", "no narrations of uid1", "uid1"),
    ("ego4d", "truncated video", lambda f: cut(f/"clips/uid2.mp4"), "error", "uid2.mp4", "uid2"),
    ("ego4d", "nothing by the wearer", lambda f: edit(f/"narration.json", "#C C", "#O man"), "error", "no clips", "narration.json"),
    ("lerobot_v21", "wrong fps", lambda f: info(f, fps=20), "error", "has time 0.100 s", "episode"),
    ("lerobot_v30", "wrong fps", lambda f: info(f, fps=20), "error", "another rate", ".mp4"),
    ("lerobot_v30", "missing video", lambda f: first(f, "*.mp4").unlink(), "error", "missing", "episode"),
    ("lerobot_v30", "truncated table", lambda f: cut(first(f/"data", "*.parquet")), "error", "damaged", "episode"),
    ("lerobot_v21", "videos exchanged", lambda f: shutil.copy(sorted(f.rglob("*.mp4"))[1], first(f, "*.mp4")), "error", "are needed", "episode 0"),
    ("lerobot_v30", "statistics of other data", lambda f: edit(f/"meta/stats.json", '"max"', '"most"') or edit(f/"meta/stats.json", '"min"', '"max"') or edit(f/"meta/stats.json", '"mean"', '"min"'), "warning", "outside the stored statistics", "meta"),
    ("lerobot_v21", "no tasks", lambda f: (f/"meta/tasks.jsonl").unlink(), "error", "missing", "lerobot"),
    ("rlds", "missing shard", lambda f: first(f, "*train*00001-of*").unlink(), "error", "shards", "00001-of-00002"),
    ("rlds", "truncated shard", lambda f: cut(first(f, "*train*00000-of*")), "error", "cut short", "00000-of-00002"),
    ("rlds", "damaged record", lambda f: first(f, "*train*00000-of*").write_bytes(first(f, "*train*00000-of*").read_bytes()[:-30] + b"x"*30), "error", "checksum", "00000-of-00002"),
    ("rlds", "no description", lambda f: (f/"1.0.0/features.json").unlink(), "error", "features.json is missing", "toy_robot"),
]


@pytest.mark.parametrize("name,what,damage,severity,said,where", DAMAGES, ids=[f"{d[0]}: {d[1]}" for d in DAMAGES])
def test_damage_is_found_and_named(sets, tmp_path, name, what, damage, severity, said, where):
    folder = folder_of(tmp_path, name)
    shutil.copytree(folder_of(sets, name), folder)
    damage(folder)
    report = examine(folder, seconds=5, hz=10)
    hits = [f for f in report.findings if f.severity == severity and said in f"{f.what} {f.found} {f.remedy}" and where in f.where]
    assert hits and all(f.remedy for f in hits), str(report)
    assert report.sound == (not report.of("error")) and not (folder/"executed").exists()
    if severity != "error": assert report.sound, str(report)
    for text in (str(report), report._repr_html_(), report._repr_markdown_(), report.to_json()): assert "Traceback" not in text


def read_as_a_run(folder):
    "How many windows, clips or episodes a run gets of a folder, every sample of which is read."
    piece = open_dataset(DatasetRef(folder, name=folder.name), 32, Reading(hz=10.))
    acts, clip = piece.data.actions, piece.units[0]
    scale = measure_scale(piece.data) if acts and not piece.data.normalised else None
    sets = [piece.samples((0., .2), chunk=2*acts, scale=scale, size=32)]
    if stored := [scan_latent(p)[1:] for p in getattr(clip, "latents", {}).values()]: sets += [piece.samples((0., .2), latent=True)]*piece.data.stores_latents(stored[0])
    for ds in sets:
        for lo in range(0, len(ds), 64): ds[lo:lo + 64]
    return len(piece.units)


JUDGED = {("calvin", "actions in metres"), ("calvin", "no actions"), ("calvin", "black images"), ("calvin", "the same image"), # what can be read and makes no sense
          ("release", "NaN action"), ("release", "latents without their factor"), ("release", "latents multiplied twice")} # actions that no run reads; a scale that a run is not told


@pytest.mark.parametrize("name,what,damage,severity,said,where", DAMAGES, ids=[f"{d[0]}: {d[1]}" for d in DAMAGES])
def test_doctor_and_reader_agree(sets, tmp_path, name, what, damage, severity, said, where):
    "What the doctor calls an error, a run refuses, or leaves out; and it refuses nothing else."
    folder = folder_of(tmp_path, name)
    shutil.copytree(folder_of(sets, name), folder)
    damage(folder)
    try: refused = read_as_a_run(folder) < read_as_a_run(folder_of(sets, name))
    except (ValueError, FileNotFoundError): refused = True
    assert refused == (severity == "error" and (name, what) not in JUDGED)


# ---- time, interruption, the command, training's question

def test_a_sample_keeps_to_its_time_and_is_spread(tmp_path):
    make_calvin(tmp_path, demos=20)
    slow = examine(tmp_path, seconds=.3)
    done, total = slow.looked["training: runs of 8 frames"]
    assert total == 60 and 1 <= done <= total and slow.seconds < 3
    report = examine(tmp_path, everything=True, seconds=.01)
    assert all(n == of for n, of in report.looked.values())


def test_a_check_that_fails_is_a_finding(sets, monkeypatch):
    def fail(*args, **kw): raise KeyError("surprise")
    monkeypatch.setattr(check_calvin, "check_windows", fail)
    report = examine(sets/"calvin")
    assert [(f.severity, f.found) for f in report.findings] == [("error", "KeyError: 'surprise'")] and "report the failure" in report.findings[0].remedy


def test_a_sample_can_be_interrupted(sets, monkeypatch):
    count, plain = iter(range(100)), check_calvin.check_run
    def look(*args):
        if next(count) == 4: signal.raise_signal(signal.SIGINT)
        return plain(*args)
    monkeypatch.setattr(check_calvin, "check_run", look)
    report = examine(sets/"calvin")
    assert report.interrupted and not report.sound and report.looked["training: runs of 8 frames"] == (5, 15)
    assert "stopped before the end" in str(report) and report.actions # what was seen until then is there
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_interruption_shows_what_was_found(tmp_path):
    make_videos(tmp_path, clips=3)
    cut(tmp_path/"0.mp4")
    (tmp_path/"captions.csv").unlink()
    write_video(tmp_path/"z.mp4", np.tile(fake_video(100, 256), (3, 1, 1, 1)), hz=10, g=250) # takes long to decode
    for i in range(150): os.symlink(tmp_path/"z.mp4", tmp_path/f"z{i}.mp4")
    command = [BIN/"defi-nb", "doctor", tmp_path, "--all"]
    with subprocess.Popen(command, env=ENV | {"DEFI_NB_PROGRESS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as child:
        watch = threading.Timer(60, child.kill) # if it hangs
        watch.start()
        for line in child.stdout:
            if re.match(r"looking at clips: [1-9]", line): break
        child.send_signal(signal.SIGINT)
        rest = child.stdout.read()
        watch.cancel()
    assert child.returncode == 130 and "stopped before the end" in rest and "0.mp4" in rest, rest


def test_command(sets, tmp_path, capsys):
    assert main(["doctor", str(sets/"calvin"), "--seconds", "3", "--json", str(tmp_path/"report.json")]) == 0
    out = capsys.readouterr().out
    assert "calvin, sound" in out and "preparation at tiny" in out
    report = json.loads((tmp_path/"report.json").read_text())
    assert report["sound"] and report["looked"]["training: runs of 8 frames"] == {"looked": 15, "total": 15}
    assert main(["doctor", str(tmp_path)]) == 1 and "these are known" not in capsys.readouterr().err
    assert main(["doctor", str(sets), "--format", "zip"]) == 2


@pytest.mark.parametrize("name", MAKE)
def test_training_asks_once(sets, tmp_path, name, capsys):
    folder = folder_of(tmp_path, name)
    shutil.copytree(folder_of(sets, name), folder)
    assert require_sound(folder, seconds=5) and "looked at for" in capsys.readouterr().out
    assert require_sound(folder) and "as seen" in capsys.readouterr().out
    kind = FORMAT.get(name, name)
    before = dataset_state(folder, kind)
    victim = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != NOTE)[-1]
    victim.unlink()
    assert dataset_state(folder, kind) != before


def test_training_refuses_a_set_with_errors_unless_told(sets, tmp_path, capsys):
    folder = shutil.copytree(sets/"calvin", tmp_path/"calvin")
    frame(folder, 7).unlink()
    for _ in range(2): # looked at, and remembered
        with pytest.raises(ValueError, match="frames are missing.*episode_0000007.npz.*unchecked=True.*defi-nb doctor"): require_sound(folder)
    assert require_sound(folder, go_on=True) is False
    shutil.copy(sets/"calvin/training/episode_0000007.npz", frame(folder, 7))
    assert require_sound(folder) is True
    (folder/NOTE).write_text("{torn")
    assert require_sound(folder) is True
    os.chmod(folder, 0o500)
    try: assert require_sound(folder) is True # and where nothing can be remembered
    finally: os.chmod(folder, 0o700)
