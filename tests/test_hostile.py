"""Files that are damaged, mislabelled or malicious, and a disk that is full: an error that names the file, the value and the remedy,
nothing executed, no memory without end, nothing half written left behind, and what was there before still good."""
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ENV

from defi_nb.core.utils import process_note, write_whole
from defi_nb.data.cache import ShardRows, shard_rows
from defi_nb.data.record import finish_split, finished_segments, write_segment
from defi_nb.data.calvin import open_calvin, read_segments
from defi_nb.core.video import fake_video, read_numbers, write_video
from defi_nb.data.episodes import Window, WindowDataset
from defi_nb.data.lerobot import LeRobotFolder
from defi_nb.core.npz import load_dict, read_npz, write_npz
from defi_nb.data.rlds import RLDSFolder, RLDSKeys
from defi_nb.data.robot_dataset import RobotSamples, measure_scale
from defi_nb.core.safe_load import read_tensors
from defi_nb.data.clips import (
    Skipped, VideoDataset, index_clips, read_annotations, read_ego4d, read_folder, read_latent,
    read_something)

from defi_nb.eval.evaluate import read_records
from defi_nb.eval.workers import Journal
from defi_nb.run.monitor import training_state
from defi_nb.train.metrics import read_metrics, replace_metrics
from defi_nb.weights.checkpoint import load_checkpoint, load_state, read_config, save_checkpoint

FIXTURES = Path(__file__).parent/"fixtures"
RLDS_KEYS = RLDSKeys(dict(front="observation/image"), "language_instruction", hz=5, action=("action/world_vector", "action/rotation_delta", "action/gripper"))


class Bomb: # a pickle that makes a folder when someone opens it
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return os.mkdir, (self.path,)


def frames(n, seed=0, size=24):
    rng = np.random.default_rng(seed)
    pictures = rng.integers(0, 256, (n, size, size, 3)).astype(np.uint8)
    return dict(rel_actions=rng.uniform(-1, 1, (n, 7)), robot_obs=rng.normal(size=(n, 15)), scene_obs=rng.normal(size=(n, 24)), rgb_static=pictures, rgb_gripper=pictures)


def calvin(folder): # two recordings, the second of one frame
    write_segment(folder/"training", 0, frames(20), "A", [Window(0, 9, "open_drawer", "open the drawer"), Window(9, 19, "turn_on_led", "turn on the light")])
    write_segment(folder/"training", 50, frames(1, 1), "A", [Window(0, 0, "turn_off_led", "turn off the light")])
    finish_split(folder/"training")
    return folder


def release(folder): # two clips in the release's annotation + video + latent format
    for name in ("1", "2"):
        write_video(folder/f"videos/train/{name}/rgb.mp4", fake_video(20), g=5)
        (folder/f"latent_videos/train/{name}").mkdir(parents=True)
        torch.save(torch.randn(20, 4, 8, 8), folder/f"latent_videos/train/{name}/0.pt")
        note = dict(texts=[f"push the block {name}"], videos=[dict(video_path=f"videos/train/{name}/rgb.mp4")], video_length=20,
                    latent_videos=[dict(latent_video_path=f"latent_videos/train/{name}/0.pt")])
        (folder/"annotation/train").mkdir(parents=True, exist_ok=True)
        (folder/f"annotation/train/{name}.json").write_text(json.dumps(note))
    return folder


def clips(folder): # a folder of videos with captions
    for name in ("a", "b"): write_video(folder/f"{name}.mp4", fake_video(20), g=5)
    (folder/"captions.csv").write_text("file_name,text\na.mp4,open the drawer\nb.mp4,close the drawer\n")
    return folder


def unzipped(name):
    def make(folder):
        with zipfile.ZipFile(FIXTURES/f"{name}.zip") as z: z.extractall(folder)
        return folder
    return make


READ = { # kind -> how a whole set of it is made, and how all of it is read
    "calvin": (calvin, lambda f: WindowDataset(r := open_calvin(f), r.windows, offsets=(0, 2), chunk=10, video=True)[:]),
    "release": (release, lambda f: VideoDataset(index_clips(read_annotations(f), latent=True), latent=True)[:]),
    "clips": (clips, lambda f: VideoDataset(index_clips(read_folder(f, "captions.csv")))[:]),
    "lerobot 2.1": (unzipped("lerobot_v21"), lambda f: RobotSamples(s := LeRobotFolder(f), times=(0, .2), chunk=3, size=64, scale=measure_scale(s, "min_max"))[:]),
    "lerobot 3.0": (unzipped("lerobot_v30"), lambda f: RobotSamples(s := LeRobotFolder(f), times=(0, .2), chunk=3, size=64, scale=measure_scale(s, "min_max"))[:]),
    "rlds": (unzipped("rlds"), lambda f: RobotSamples(s := RLDSFolder(f/"toy_robot/1.0.0", RLDS_KEYS), times=(0, .4), chunk=3, size=24, scale=measure_scale(s, "min_max"))[:]),
}


@pytest.fixture(scope="module", params=READ)
def whole(request, tmp_path_factory): # a set that is good
    make, read = READ[request.param]
    folder = make(tmp_path_factory.mktemp("whole"))
    assert len(read(folder)) > 1
    return folder, read


@pytest.fixture
def made(tmp_path): # a set to break
    return lambda kind: (READ[kind][0](tmp_path/"set"), READ[kind][1])


def refused(do, *names):
    "An error of one line that names the file and says what to do."
    with pytest.raises((ValueError, FileNotFoundError)) as e: do()
    text = str(e.value)
    assert "\n" not in text and all(name in text for name in names), text
    assert any(word in text for word in ("again", "name another", "download it", "restore", "repair", "keep the others", "leave", "give", "write", "choose", "mend", "make room", "add one", "read another")), text
    return text


def data_files(folder): # largest of each kind
    kinds = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "expected" not in path.name and path.suffix not in (".csv", ".md", ".yaml") and path.stat().st_size > 100: kinds.setdefault((path.suffix, path.parent.name[:7]), path)
    return [p for p in kinds.values() if p.parent.name not in ("segments",) and "stats" not in p.name and p.name != "ep_lens.npy"]


@pytest.mark.parametrize("share", [0, .5, .97])
def test_truncated(whole, tmp_path, share):
    "Each kind of file of a set, cut: an error that names it, or (what follows the data of a video is cut) the same data."
    folder, read = whole
    expected = read(folder)
    for path in data_files(folder):
        here = tmp_path/path.relative_to(folder)
        if not (tmp_path/"set").exists(): shutil.copytree(folder, tmp_path/"set")
        here = tmp_path/"set"/path.relative_to(folder)
        data = here.read_bytes()
        here.write_bytes(data[:int(share*len(data))])
        try: got = read(tmp_path/"set")
        except (ValueError, FileNotFoundError) as e: assert "\n" not in str(e) and (here.name in str(e) or str(here.parent) in str(e)), e
        else: assert here.suffix == ".mp4" and torch.equal(got.video, expected.video), here
        here.write_bytes(data)


def test_missing(whole, tmp_path):
    "Each kind of file of a set, gone: shards of RLDS, LeRobot's Parquet and mp4, frames, videos, latents, annotations."
    folder, read = whole
    shutil.copytree(folder, tmp_path/"set")
    for path in data_files(folder):
        if path.name in ("features.json", "scene_info.npy"): continue # without its scenes a recording is read all the same
        here = tmp_path/"set"/path.relative_to(folder)
        here.rename(tmp_path/"aside")
        if path.parent.name == "train" and path.suffix == ".json": assert len(read(tmp_path/"set")) == 1 # one clip less
        else: refused(lambda: read(tmp_path/"set"), here.name)
        (tmp_path/"aside").rename(here)


def test_a_pickle_runs_nothing(tmp_path, made):
    marker = tmp_path/"ran"
    folder, read = made("calvin")
    for name in ("scene_info.npy", "lang_annotations/auto_lang_ann.npy", "ep_start_end_ids.npy"):
        path = folder/"training"/name
        good = path.read_bytes()
        for bad in (dict(language=Bomb(marker)), [Bomb(marker)], Bomb(marker)):
            np.save(path, np.array(bad, object) if isinstance(bad, list) else bad, allow_pickle=True)
            refused(partial(read, folder), path.name)
        path.write_bytes(good)
    np.savez(folder/"training/episode_0000003.npz", **{k: np.array([Bomb(marker)]) for k in frames(1)})
    refused(lambda: read(folder), "episode_0000003.npz", "objects")
    for thing in (Bomb(marker), [torch.ones(2), Bomb(marker)], dict(state_dict=dict(w=torch.ones(2)), more=Bomb(marker))):
        torch.save(thing, tmp_path/"bomb.pt")
        for read_it in (lambda p: read_latent(p, [0]), read_tensors): refused(partial(read_it, tmp_path/"bomb.pt"), "bomb.pt", "posix.mkdir")
    (tmp_path/"bare.pt").write_bytes(pickle.dumps(Bomb(marker)))
    refused(lambda: read_latent(tmp_path/"bare.pt", [0]), "bare.pt")
    assert not marker.exists()


BOMBS = """
import resource, struct, sys, zipfile, zlib
from pathlib import Path
import numpy as np, torch
from defi_nb.data.calvin import open_calvin
from defi_nb.core.npz import load_dict, read_npz
from defi_nb.core.safe_load import read_tensor, read_tensors
from defi_nb.data.rlds import read_record, scan_records

tmp, folder = map(Path, sys.argv[1:])
class Asks:
    def __init__(self, *how): self.how = how
    def __reduce__(self): return self.how

def npy(name, code, shape=()): # a pickle in an npy file
    with open(tmp/name, "wb") as f:
        np.lib.format.write_array_header_1_0(f, dict(descr="|O", fortran_order=False, shape=shape))
        f.write(code)
    return tmp/name

def archive(name, code, data=b"", method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(tmp/name, "w", method) as z:
        z.writestr("archive/data.pkl", code)
        z.writestr("archive/data/0", data)
    return tmp/name

import pickle
rebuild, HUGE = np.arange(1).__reduce__()[0], 2**36 # 64 GB of bytes
whole = zlib.compressobj(9, zlib.DEFLATED, -15)
zeros = b"".join(whole.compress(bytes(2**20)) for _ in range(400)) + whole.flush() # 400 MB in 0.4 MB
with zipfile.ZipFile(tmp/"lying.npz", "w") as z: z.writestr("rgb_static.npy", zeros)
data = bytearray((tmp/"lying.npz").read_bytes()) # says that it is stored in 9000 bytes by zlib
for mark, at in ((b"PK\\3\\4", 8), (b"PK\\1\\2", 10)): struct.pack_into("<H", data, data.index(mark) + at, 8)
for mark, at in ((b"PK\\3\\4", 22), (b"PK\\1\\2", 24)): struct.pack_into("<I", data, data.index(mark) + at, 9000)
(tmp/"lying.npz").write_bytes(data)
with open(tmp/"header.npy", "wb") as f: np.lib.format.write_array_header_1_0(f, dict(descr="<i8", fortran_order=False, shape=(HUGE, 2)))
(folder/"training/ep_start_end_ids.npy").write_bytes((tmp/"header.npy").read_bytes())
(tmp/"record").write_bytes(struct.pack("<Q", 2**62) + bytes(20))
torch.save(torch.ones(4), tmp/"small.pt")
with zipfile.ZipFile(tmp/"small.pt") as z: small = z.read("small/data.pkl")
view = small.replace(b"K\\x04\\x85", b"\\x8a\\x06\\x00\\x00\\x00\\x00\\x00\\x01\\x85") # a tensor of 2**40 numbers
assert view != small
bombs = {
    "remembered": lambda: load_dict(npy("a.npy", b"\\x80\\x04}r\\xff\\xff\\xff\\x7f.")),
    "empty array": lambda: load_dict(npy("b.npy", pickle.dumps(Asks(np.ndarray, ((HUGE,), np.dtype("u1")))))),
    "object array": lambda: load_dict(npy("c.npy", pickle.dumps(Asks(rebuild, (np.ndarray, (0,), b"b"), (1, (HUGE,), np.dtype("O"), False, []))))),
    "wide type": lambda: load_dict(npy("d.npy", pickle.dumps(Asks(np.dtype, (f"V{2**31 - 1}",))))),
    "bytes": lambda: load_dict(npy("e.npy", pickle.dumps(Asks(bytearray, (HUGE,))))),
    "long text": lambda: load_dict(npy("f.npy", b"\\x80\\x04\\x8d" + struct.pack("<Q", HUGE) + b".")),
    "nested": lambda: load_dict(npy("g.npy", b"\\x80\\x04" + b")" + b"\\x85"*200000 + b".")),
    "laughs": lambda: load_dict(npy("h.npy", b"\\x80\\x04]" + b"2\\x86"*60 + b".")),
    "segments": lambda: open_calvin(folder),
    "lying member": lambda: read_npz(tmp/"lying.npz", ("rgb_static",)),
    "latent of bytes": lambda: read_tensor(archive("i.pt", pickle.dumps(Asks(bytearray, (HUGE,))))),
    "latent remembered": lambda: read_tensor(archive("j.pt", b"\\x80\\x02}r\\xff\\xff\\xff\\x7f.")),
    "latent deflated": lambda: read_tensor(archive("k.pt", small, bytes(2**26), zipfile.ZIP_DEFLATED)),
    "latent of 4 TB": lambda: read_tensor(archive("l.pt", view, bytes(16))),
    "weights of 4 TB": lambda: read_tensors(archive("m.pt", view, bytes(16))),
    "record": lambda: scan_records(tmp/"record"),
}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name, bomb in bombs.items():
    try: bomb()
    except ValueError as e: assert "\\n" not in str(e) and str(tmp) in str(e) or str(folder) in str(e), (name, e)
    else: raise SystemExit(f"{name} was read")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)/1000
    if grown > 200: raise SystemExit(f"{name} took {grown:.0f} MB")
print(f"{len(bombs)} refused")
"""


def test_memory_bombs(tmp_path):
    folder = calvin(tmp_path/"set")
    done = subprocess.run([sys.executable, "-c", BOMBS, str(tmp_path), str(folder)], env=ENV, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "refused" in done.stdout, done.stdout + done.stderr[-2000:]


def test_wrong_dtypes(tmp_path, made):
    folder, read = made("calvin")
    path = folder/"training/episode_0000004.npz"
    good = read_npz(path, tuple(frames(1)))
    for key, value in (("rgb_static", good["rgb_static"]/255), ("rgb_static", good["rgb_static"][..., 0]), ("rgb_gripper", good["rgb_gripper"].astype(np.int16)),
                       ("rel_actions", good["rel_actions"].astype(str)), ("robot_obs", good["robot_obs"][:14]), ("scene_obs", good["scene_obs"].astype(int))):
        write_npz(path, dict(good) | {key: value})
        refused(partial(read, folder), path.name, key, str(value.dtype))
    for value in (np.nan, 5.):
        write_npz(path, dict(good) | dict(rel_actions=np.full(7, value)))
        refused(partial(read, folder), path.name)
    for value in (torch.ones(9, 4, 8, 8, dtype=torch.int32), torch.ones(4, 8, 8), torch.ones(0, 4, 8, 8)):
        torch.save(value, tmp_path/"latent.pt")
        refused(lambda: read_latent(tmp_path/"latent.pt", [0]), "latent.pt", str(value.dtype))


def test_empty_captions(tmp_path, made):
    folder, read = made("clips")
    (folder/"captions.csv").write_text("file_name,text\na.mp4,\nb.mp4,close the drawer\n")
    refused(lambda: read(folder), "a.mp4", "no caption")
    assert len(VideoDataset(index_clips(read_folder(folder, "captions.csv"), on_problem=(skipped := Skipped())))) == 1 and "a.mp4" in skipped
    assert len(index_clips(read_folder(folder, "captions.csv"), empty_text=True)) == 2
    (folder/"a.mp4").rename(folder/"003.mp4")
    refused(lambda: index_clips(read_folder(folder)), "003.mp4", "no caption")

    notes = release(tmp_path/"notes")
    for text in ([""], [" "], []):
        (notes/"annotation/train/1.json").write_text(json.dumps(json.loads((notes/"annotation/train/2.json").read_text()) | dict(texts=text)))
        refused(lambda: READ["release"][1](notes), "'1'", "no caption")

    (tmp_path/"labels").mkdir()
    (tmp_path/"labels/train.json").write_text(json.dumps([dict(id="7", label="", template="")]))
    write_video(tmp_path/"20bn-something-something-v2/7.webm", fake_video(9), codec="libvpx-vp9")
    refused(lambda: index_clips(read_something(tmp_path)), "'7'", "no caption")
    write_video(tmp_path/"ego/u.mp4", fake_video(30), hz=10)
    (tmp_path/"ego/narration.json").write_text(json.dumps({"u": dict(narration_pass_1=dict(narrations=[dict(timestamp_sec=1, narration_text="#C C ")]))}))
    refused(lambda: index_clips(read_ego4d(tmp_path/"ego", tmp_path/"ego/narration.json")), "u/0", "no caption")

    folder = calvin(tmp_path/"play")
    path = folder/"training/lang_annotations/auto_lang_ann.npy"
    notes = load_dict(path)
    notes["language"]["ann"][1] = "  "
    np.save(path, notes)
    refused(partial(READ["calvin"][1], folder), "auto_lang_ann.npy", "frames 9 to 19", "no instruction")


def test_one_frame(tmp_path, made):
    write_video(tmp_path/"still.mp4", fake_video(20)[7:8])
    ready = index_clips(read_folder(tmp_path))
    batch = VideoDataset(ready, offsets_seconds=(0, .5, 1.))[:]
    assert batch.video.shape[:3] == (1, 1, 3) and read_numbers(batch.video[0, 0]).tolist() == [7]*3
    text = refused(lambda: VideoDataset(ready, min_left_seconds=1.), "none of 1 clips")
    assert "take other clips or times" in text
    folder, read = made("calvin")
    batch = read(folder)
    assert batch.text[-1] == "turn off the light" and (batch.video[-1, :, 0] == batch.video[-1, :, 1]).all() and (batch.action[-1, 1:, :6] == 0).all()
    for kind in ("lerobot 2.1", "lerobot 3.0"): assert 1 in LeRobotFolder(READ[kind][0](tmp_path/kind)).lengths


def test_nonsense_in_the_right_place(whole, tmp_path):
    "Each kind of file replaced by zeros, by text, and by deep nesting."
    folder, read = whole
    shutil.copytree(folder, tmp_path/"set")
    for path in data_files(folder):
        here = tmp_path/"set"/path.relative_to(folder)
        good = here.read_bytes()
        for data in (bytes(len(good)), b"not found\n"*50, b"["*100_000):
            here.write_bytes(data)
            with pytest.raises((ValueError, FileNotFoundError)) as e: read(tmp_path/"set")
            assert "\n" not in str(e.value) and (here.name in str(e.value) or str(here.parent) in str(e.value)), (here, e.value)
        here.write_bytes(good)
    read(tmp_path/"set")


FULL = """
import errno, os, resource, shutil, signal, sys, warnings
from contextlib import contextmanager
from pathlib import Path
import numpy as np, torch
from torch import nn
from defi_nb.data.record import finish_split, finished_segments, write_segment
from defi_nb.data.calvin import open_calvin, read_vectors
from defi_nb.weights.checkpoint import load_checkpoint, save_checkpoint
from defi_nb.core.video import fake_video, read_frames, write_video
from defi_nb.data.episodes import Window, WindowDataset
from defi_nb.core.utils import write_whole
from defi_nb.core.npz import read_npz, write_npz
from defi_nb.data.rlds import scan_records, write_records
from defi_nb.data.clips import index_clips, read_folder

disk, limit, case = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]

@contextmanager
def full(left): # so many bytes can still be written, on a disk of a few megabytes, or, without one, into each file
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (left, resource.RLIM_INFINITY))
        yield
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,)*2)
        return
    filler = disk/"filler"
    with open(filler, "wb", buffering=0) as f:
        try:
            while True: f.write(bytes(4096))
        except OSError: pass
        f.truncate(max(0, f.tell() - left)//4096*4096)
    yield
    filler.unlink()

def fails(do, *names):
    try: do()
    except Exception as e:
        text, seen = str(e), e
        while seen is not None and getattr(seen, "errno", None) not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT) and not any(w in str(seen) for w in ("space", "large", "the disk has")):
            seen = seen.__cause__ or seen.__context__
        assert seen is not None, f"{case}: an error that does not speak of the disk: {e!r}"
        assert all(n in text for n in names), f"{case}: {text!r} does not name {names}"
        return text
    raise SystemExit(f"{case}: nothing was said")

def files(folder): return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != "filler" and p.suffix != ".lock")

rng = np.random.default_rng(0)
noise = lambda *shape: rng.integers(0, 256, shape).astype(np.uint8)
def segment(n): return dict(rel_actions=rng.uniform(-1, 1, (n, 7)), robot_obs=rng.normal(size=(n, 15)), scene_obs=rng.normal(size=(n, 24)), rgb_static=noise(n, 32, 32, 3), rgb_gripper=noise(n, 32, 32, 3))
window = lambda n: [Window(0, n - 1, "open_drawer", "open the drawer")]
def recording(n=20):
    write_segment(disk/"play/training", 0, segment(n), "A", window(n))
    finish_split(disk/"play/training")
    return disk/"play"

def frame():
    write_npz(disk/"a.npz", dict(x=np.arange(3)))
    with full(2**15): fails(lambda: write_npz(disk/"a.npz", dict(x=noise(2**18))), "a.npz")
    assert files(disk) == ["a.npz"] and (read_npz(disk/"a.npz", ("x",))["x"] == np.arange(3)).all()

def recorder():
    folder = recording()/"training"
    before, later = files(folder), segment(40)
    with full(2**12 if limit else 2**16): fails(lambda: write_segment(folder, 100, later, "A", window(40)), "episode_")
    assert list(finished_segments(folder)) == [0] and not [f for f in files(folder) if f.endswith(".tmp")] and set(before) <= set(files(folder))
    assert len(open_calvin(folder.parent)) == 20 # as it was
    write_segment(folder, 100, later, "A", window(40)) # goes on when there is room
    finish_split(folder)
    assert (open_calvin(folder.parent).video["static"][20:] == later["rgb_static"]).all()

def unpacked():
    folder = recording()
    whole = {v: np.asarray(x) for v, x in open_calvin(folder).video.items()}
    with full(2**14), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for view, x in open_calvin(folder, cache=disk/"cache").video.items(): assert (np.asarray(x) == whole[view]).all() # read all the same
    assert any("static-full" in str(w.message) and "make room" in str(w.message) for w in caught), caught
    for _ in range(2):
        for view, x in open_calvin(folder, cache=disk/"cache").video.items(): assert (np.asarray(x) == whole[view]).all()

def lazy_pack():
    folder = recording(200)
    whole = read_vectors(open_calvin(folder))
    with full(2**13), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        frames = open_calvin(folder, cache=disk/"cache")
        for _ in range(2): assert (np.asarray(frames.action) == whole.action).all()
    assert any("cannot be written" in str(w.message) and "make room" in str(w.message) for w in caught), caught
    open_calvin(folder, cache=disk/"cache").action[:]
    assert (np.asarray(open_calvin(folder, cache=disk/"cache").scene_obs) == whole.scene_obs).all()

def prepared():
    from defi_nb.data.episodes import FrameTable
    from defi_nb.data.cache import encode_images
    frames = open_calvin(recording(), size=8)
    encode = lambda x: x.float().mean((2, 3)).repeat(1, 2000) # 20 x 2 x 6000 x 2 bytes
    prepare = lambda: np.asarray(encode_images(FrameTable(frames), encode, disk/"cache/codes", "wide mean", batch_size=4))
    with full(2**15): fails(prepare, "cache/codes")
    assert np.allclose(prepare()[:, 0, :3], frames.video["static"][:].mean((1, 2)), atol=.1)

def checkpoint():
    model, other = nn.Linear(128, 128), nn.Linear(128, 128)
    save_checkpoint(disk/"model", model, dict(n=1), step=1)
    weight = model.weight.detach().clone()
    nn.init.ones_(model.weight)
    with full(2**14): fails(lambda: save_checkpoint(disk/"model", model, dict(n=1), step=2))
    assert load_checkpoint(disk/"model", other, dict(n=1))["step"] == 1 and torch.equal(other.weight, weight)
    save_checkpoint(disk/"model", model, dict(n=1), step=2)
    assert load_checkpoint(disk/"model", other, dict(n=1))["step"] == 2 and torch.equal(other.weight, model.weight)
    assert files(disk/"model") == ["config.json", "model.safetensors", "state.json", "state.safetensors"]

def video():
    write_video(disk/"a.mp4", fake_video(9))
    before = (disk/"a.mp4").read_bytes()
    with full(2**13): fails(lambda: write_video(disk/"a.mp4", noise(60, 128, 128, 3)))
    assert files(disk) == ["a.mp4"] and (disk/"a.mp4").read_bytes() == before

def video_index():
    for i in range(30): write_video(disk/f"clips/{'long_name_'*8}{i:03}.mp4", fake_video(9))
    with full(0 if not limit else 64), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert len(index_clips(read_folder(disk/"clips"), cache=disk/"clips")) == 30 # works, and says that it won't remember
    assert any("cannot be written" in str(w.message) for w in caught), caught
    assert len(index_clips(read_folder(disk/"clips"), cache=disk/"clips")) == 30

def records():
    write_records(disk/"a.tfrecord", [b"x"*100])
    with full(2**13): fails(lambda: write_records(disk/"a.tfrecord", [bytes(noise(2**12)) for _ in range(40)]), "a.tfrecord")
    assert files(disk) == ["a.tfrecord"] and len(scan_records(disk/"a.tfrecord")) == 1

def text():
    write_whole(disk/"metrics.json", "{}")
    with full(2**12): fails(lambda: write_whole(disk/"metrics.json", "x"*2**16), "metrics.json")
    assert files(disk) == ["metrics.json"] and (disk/"metrics.json").read_text() == "{}"

globals()[case]()
print("done", case, "with a limit" if limit else "on a full disk")
"""

WRITERS = ("frame", "recorder", "unpacked", "lazy_pack", "prepared", "checkpoint", "video", "video_index", "records", "text")


@pytest.fixture(scope="module")
def tiny_disk(tmp_path_factory):
    "How to run a script on a disk of its own of 4 MB; where that is not allowed, with a limit on the size of each file."
    folder = tmp_path_factory.mktemp("disk")
    mount = ["unshare", "--map-root-user", "--mount", "sh", "-c", f'mount -t tmpfs -o size=4m tmpfs "{folder}" && exec "$0" "$@"']
    allowed = shutil.which("unshare") and subprocess.run([*mount, "true"], capture_output=True).returncode == 0
    return folder, mount if allowed else [], 0 if allowed else 1


@pytest.fixture(scope="module")
def full_disk(tiny_disk, tmp_path_factory):
    "Every writer's case, each in a process of its own, two at a time."
    folder, mount, limit = tiny_disk
    script = tmp_path_factory.mktemp("script")/"full.py"
    script.write_text(FULL)
    def start(case):
        (folder/case).mkdir()
        place = folder if mount else folder/case
        return subprocess.Popen([*mount, sys.executable, str(script), str(place), str(limit), case], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with ThreadPoolExecutor(2) as pool: yield {case: pool.submit(lambda case=case: (p := start(case)).communicate(timeout=120)[0] + f"\nrc {p.returncode}") for case in WRITERS}


@pytest.mark.parametrize("case", WRITERS)
def test_full_disk(full_disk, case):
    if case == "prepared": pytest.importorskip("defi_nb.data.cache")
    said = full_disk[case].result()
    assert said.endswith("rc 0") and f"done {case}" in said, said[-3000:]


def own_files(folder):
    "What this package writes itself, and how it is read: name of a file -> function of no arguments."
    numbers = lambda lo, hi: np.arange(lo, hi)[:, None]
    save_checkpoint(folder/"ckpt", net := torch.nn.Linear(3, 3), config=dict(), step=5, info=dict(encoders={}), state=dict(a=1))
    replace_metrics(folder/"ckpt", [dict(step=i, loss=1/(i + 1)) for i in range(5)])
    write_whole(folder/"ckpt/run.json", json.dumps(dict(steps=9) | process_note()))
    write_whole(folder/"run/training.json", json.dumps(dict(checkpoint=str(folder/"ckpt"))))
    for journal in (Journal(folder/"eval", dict(policy="p", protocol=dict(a=1))),):
        journal.begin()
        for i in range(3): journal.add(dict(chain=i, solved=1, steps=[3, 4]))
    rows = shard_rows(folder/"rows", 40, numbers, dict(of="1"), dtype=np.float32, most_rows=20)
    split = calvin(folder/"split")/"training"
    read = lambda: ShardRows(rows.folder)[:]
    return {"ckpt/config.json": lambda: read_config(folder/"ckpt"), "ckpt/state.json": lambda: load_state(folder/"ckpt"),
            "ckpt/model.safetensors": lambda: load_checkpoint(folder/"ckpt", net, {}), "ckpt/metrics.jsonl": lambda: read_metrics(folder/"ckpt"),
            "ckpt/run.json": lambda: training_state(folder/"ckpt"), "run/training.json": lambda: training_state(folder/"run"),
            "eval/chains.jsonl": lambda: read_records(folder/"eval"), f"{rows.folder.name}/manifest.json": read, f"{rows.folder.name}/00001.npy": read,
            "split/training/ep_start_end_ids.npy": lambda: read_segments(split), "split/training/segments/0000050.json": lambda: finished_segments(split)}


def mutated(data, rng):
    "Some bytes as a broken disk, a full one or an editor leaves them."
    data, at = bytearray(data), int(rng.integers(0, max(len(data), 1)))
    kind = rng.integers(6)
    if kind == 0: data[at] ^= 1 << rng.integers(8)
    elif kind == 1: data = data[:at]
    elif kind == 2: data[at:at + 30] = bytes(len(data[at:at + 30]))
    elif kind == 3: data = bytearray(b"[1, 2]\n")
    elif kind == 4: data = bytearray(b'{"a": "\xff"}\n' if rng.random() < .5 else b'{"a": 1}\n')
    else: data[at:at] = data[at:at + 12]
    return bytes(data)


@pytest.mark.filterwarnings("ignore")
def test_damage_of_our_own_files_is_one_line(tmp_path):
    "40 seeded mutations of each: what it holds, or one line that names it and says what to do; weights, states and shards are never other than they were."
    readers, rng = own_files(tmp_path), np.random.default_rng(0)
    for name, read in readers.items():
        path, whole = tmp_path/name, (tmp_path/name).read_bytes()
        good, errors = repr(read()), 0
        for _ in range(40):
            path.write_bytes(mutated(whole, rng))
            try: found = repr(read())
            except (ValueError, FileNotFoundError) as e:
                errors += 1
                text = str(e)
                assert (path.name in text or "run.json" in text) and "\n" not in text and re.search("again|delete|restore|give|correct|next training|put that file", text), text
            else:
                if name.endswith((".npy", ".safetensors", "config.json", "state.json", "manifest.json")) and "ids" not in name: assert found == good or path.read_bytes() == whole, (name, found, good)
        path.write_bytes(whole)
        assert repr(read()) == good and (errors >= 4 or path.name == "metrics.jsonl"), name # of which only the lines are lost
