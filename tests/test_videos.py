"Video is read frame by exact frame, from any rate and codec, and broken files are named instead of believed."
import json
import math
import os
import pickle
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import ENV
from torch.utils.data import DataLoader

from defi_nb.core import video as decode
from defi_nb.core.video import (
    fake_video, index_files, read_frames, read_numbers, scan_video, write_video)
from defi_nb.core.spec import DataSpec, check_batch
from defi_nb.train.config import TrainConfig
from defi_nb.train.fit import fit
from defi_nb.data.clips import (
    Clip, EveryOther, Skipped, VideoDataset, WholeClip, index_clips, nearest, read_annotations,
    read_ego4d, read_folder, read_latent, read_something, scan_latent)

REAL = Path(__file__).resolve().parents[2]/"shared"/"data"/"real_clips"
real = pytest.mark.skipif(not REAL.exists(), reason="the real clips are not beside this checkout")
os.environ["SVT_LOG"] = "1"

OPEN = {"x265-params": "keyint={}:min-keyint={}:open-gop=1:bframes=4:log-level=none"}
KINDS = {
    "h264": ("mp4", "libx264", {}), "h264-b": ("mp4", "libx264", dict(bf=4, sc_threshold=0)),
    "h264-open": ("mp4", "libx264", {"x264-params": "open-gop=1:bframes=4:scenecut=0"}),
    "h265-open": ("mp4", "libx265", OPEN), "mpeg4-b": ("mp4", "mpeg4", dict(bf=2, qscale=2)), "vp9": ("webm", "libvpx-vp9", {}),
    "vp8": ("webm", "libvpx", {}), "av1": ("mp4", "libsvtav1", {"crf": 18, "svtav1-params": "preset=10"}), "h264-mkv": ("mkv", "libx264", dict(bf=3)),
}


def made(folder, kind, hz, g, n=70):
    suffix, codec, options = KINDS[kind]
    options = {k: str(v).format(g, g) for k, v in options.items()}
    if "open-gop" not in str(options) or codec == "libx264": options["g"] = g
    return write_video(folder/f"{kind}-{g}-{hz}.{suffix}".replace("/", "_"), fake_video(n), hz=hz, codec=codec, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hz,g", [("30000/1001", 12), (3, 1), (25, 250)])
def test_random_access_is_exact(tmp_path, kind, hz, g):
    path, rng = made(tmp_path, kind, hz, g), np.random.default_rng(0)
    info = scan_video(path, decode=True)
    assert info == scan_video(path) and len(info) == 70
    np.testing.assert_allclose(np.diff(info.times), 1/eval(str(hz)), atol=2e-3)
    with av.open(str(path)) as file: sequential = np.stack([f.to_ndarray(format="rgb24") for f in file.decode(video=0)])
    for _ in range(12):
        rows = rng.integers(0, 70, rng.integers(1, 6))
        frames = read_frames(path, rows, info)
        assert (frames == sequential[rows]).all()
        assert read_numbers(frames).tolist() == rows.tolist()


def test_an_index_that_errs_about_key_frames_still_gives_the_right_frame(tmp_path, monkeypatch):
    "A container may call frames key frames where decoding can't begin; then a seek lands too late, and goes back further."
    path, seeks, plain = made(tmp_path, "h265-open", 10, 10), [], decode._seek
    monkeypatch.setattr(decode, "_torchcodec", lambda: None)
    monkeypatch.setattr(decode, "_seek", lambda file, stream, pts: seeks.append(pts) or plain(file, stream, pts))
    info = replace(scan_video(path), keys=decode.pack_integers(range(70)))
    for row in range(70): assert read_numbers(read_frames(path, [row], info)).tolist() == [row]
    assert len(seeks) > 80


def test_rate_that_varies(tmp_path):
    stamps = np.cumsum(np.random.default_rng(1).integers(20, 400, 60))
    for name in ("a.mp4", "a.mkv"):
        path = write_video(tmp_path/name, fake_video(60), hz=30, times=stamps)
        np.testing.assert_allclose(scan_video(path).times, (stamps - stamps[0])/1000, atol=1.5e-3)
        ds = VideoDataset(index_clips([Clip("a", "a", {"video": path})]), offsets_seconds=(0, .5, 1.), stride_seconds=.7)
        for i in range(len(ds)):
            _, rows, _ = ds.sample(i)
            wanted = i*.7 + np.array([0, .5, 1.])
            assert rows.tolist() == [int(np.abs(scan_video(path).times - t).argmin()) for t in wanted]
            assert read_numbers(ds[i].video)[0, 0].tolist() == rows.tolist()


def test_turned_as_the_camera_was_held(tmp_path):
    data = bytearray(write_video(tmp_path/"a.mp4", fake_video(9)[:, :, :48], g=4).read_bytes())
    upright = read_frames(tmp_path/"a.mp4", [5])[0]
    at = data.index(b"tkhd") + 4 + (24 if data[data.index(b"tkhd") + 4] == 0 else 36) + 16
    for turn, m in ((3, (0, 1, -1, 0)), (2, (-1, 0, 0, -1)), (1, (0, -1, 1, 0))):
        data[at:at + 36] = struct.pack(">9i", *(x << 16 if x > 0 else -(-x << 16) for x in (m[0], m[1], 0, m[2], m[3], 0, 0, 0, 1 << 14)))
        (tmp_path/"turned.mp4").write_bytes(data)
        assert (read_frames(tmp_path/"turned.mp4", [5])[0] == np.rot90(upright, turn)).all()


def test_torchcodec_gives_the_same(tmp_path, monkeypatch):
    pytest.importorskip("torchcodec.decoders")
    assert decode._torchcodec() is not None
    paths = [made(tmp_path, kind, 10, 12) for kind in KINDS] + sorted(REAL.glob("*/videos/val/*/rgb.mp4"))
    used, rows = [], [20, 3, 3, 0]
    mine = decode._torchcodec_frames
    for path in paths:
        monkeypatch.setattr(decode, "_torchcodec_frames", lambda *args: used.append(mine(*args) is not None) or mine(*args))
        by_torchcodec = read_frames(path, rows)
        monkeypatch.setattr(decode, "_torchcodec_frames", lambda *args: None)
        assert (by_torchcodec == read_frames(path, rows)).all(), path
    print(sum(used), "of", len(used), "files were decoded by torchcodec")
    assert sum(used) >= len(used)//2


def spoil(path, content, name):
    (path.parent/name).write_bytes(content)
    return path.parent/name


def test_broken_files_are_named(tmp_path):
    whole = write_video(tmp_path/"whole.mp4", fake_video(90), g=10)
    data = whole.read_bytes()
    front = tmp_path/"front.mp4" # the index before the frames: a cut file opens
    with av.open(str(whole)) as file, av.open(str(front), "w", options=dict(movflags="faststart")) as out:
        stream = out.add_stream_from_template(file.streams.video[0])
        for p in file.demux(video=0):
            if p.size: p.stream = stream; out.mux(p)
    webm = write_video(tmp_path/"whole.webm", fake_video(90), codec="libvpx-vp9")
    broken = [spoil(whole, data[:n], f"cut{n}.mp4") for n in (0, 1, 30, 1000, len(data)//2, len(data) - 100)]
    broken += [spoil(front, front.read_bytes()[:int(share*front.stat().st_size)], f"front{share}.mp4") for share in (.4, .7, .95)]
    broken += [spoil(webm, webm.read_bytes()[:int(share*webm.stat().st_size)], f"cut{share}.webm") for share in (.3, .6)]
    broken += [spoil(whole, b"words\n"*1000, "words.mp4"), spoil(whole, b"\0"*5000, "zeros.mp4"),
               spoil(whole, f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{whole}\n#EXT-X-ENDLIST\n".encode(), "list.mp4"),
               spoil(whole, f"ffconcat version 1.0\nfile {whole.name}\n".encode(), "concat.mp4")]
    for path in broken:
        with pytest.raises(ValueError) as e: scan_video(path)
        assert str(path) in str(e.value) and "\n" not in str(e.value), str(e.value)
    with pytest.raises(FileNotFoundError, match="none.mp4 is missing"): scan_video(tmp_path/"none.mp4")
    sound = tmp_path/"sound.mp4"
    with av.open(str(sound), "w") as out:
        stream = out.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 8000
        for p in [*stream.encode(frame), *stream.encode()]: out.mux(p)
    with pytest.raises(ValueError, match="holds no video"): scan_video(sound)

    clips = [Clip(p.name, "a caption", {"video": p}) for p in (whole, *broken, sound, tmp_path/"none.mp4")]
    skip = Skipped()
    assert [c.id for c in index_clips(clips, cache=tmp_path/"cache", on_problem=skip)] == ["whole.mp4"]
    assert list(skip) == [c.id for c in clips[1:]]
    again = Skipped()
    index_clips(clips, cache=tmp_path/"cache", on_problem=again)
    assert again == skip


def test_damage_in_the_middle_is_found_by_decoding(tmp_path):
    data = bytearray(write_video(tmp_path/"a.mp4", fake_video(90, 128), g=10).read_bytes())
    middle = data.index(b"mdat") + len(data)//3
    data[middle:middle + 400] = b"\xff"*400
    (tmp_path/"a.mp4").write_bytes(data)
    assert len(scan_video(tmp_path/"a.mp4")) == 90 # the packets are all there
    with pytest.raises(ValueError, match=r"a.mp4.*(damaged|decoded|can't be read)"): scan_video(tmp_path/"a.mp4", decode=True)


def test_one_frame_and_no_caption(tmp_path):
    path = write_video(tmp_path/"one.mp4", fake_video(1))
    clip = Clip("one", "a caption", {"video": path})
    ready = index_clips([clip])
    assert read_numbers(VideoDataset(ready, (0, 1))[0].video).tolist() == [[[0, 0]]]
    assert read_numbers(VideoDataset(ready, sampling=WholeClip())[0].video).tolist() == [[[0]*16]]
    with pytest.raises(ValueError, match="none of 1 clips gives a sample"): VideoDataset(ready, (0, 1), min_left_seconds=1)
    with pytest.raises(ValueError, match="clip 'one' has no caption"): index_clips([replace(clip, text="  ")])
    assert VideoDataset(index_clips([replace(clip, text="")], empty_text=True))[0].text == [""]
    with pytest.raises(ValueError, match="'one' is there twice"): index_clips([clip, clip])


class Bomb:
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return os.mkdir, (self.path,)


def test_latents_run_nothing_and_are_finite(tmp_path):
    good, marker = tmp_path/"good.pt", tmp_path/"ran"
    stored = torch.randn(9, 4, 32, 32)
    torch.save(stored, good)
    assert torch.equal(read_latent(good, [8, 0, 8], scale=.5), stored[[8, 0, 8]]/.5)
    torch.save(stored, tmp_path/"old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="old.pt is a bare pickle or an old torch file.*again with torch 1.6 or later"): read_latent(tmp_path/"old.pt", [3])
    torch.save(stored.double().half(), tmp_path/"half.pt")
    assert read_latent(tmp_path/"half.pt", [3]).dtype == torch.float32

    (tmp_path/"plain.pt").write_bytes(pickle.dumps(Bomb(marker)))
    torch.save(Bomb(marker), tmp_path/"bomb.pt")
    torch.save(dict(latent=stored, more=Bomb(marker)), tmp_path/"hidden.pt")
    torch.save(dict(latent=stored), tmp_path/"dict.pt")
    torch.save(stored[0], tmp_path/"flat.pt")
    torch.save(stored.int(), tmp_path/"int.pt")
    (tmp_path/"cut.pt").write_bytes(good.read_bytes()[:5000])
    (tmp_path/"zero.pt").write_bytes(b"")
    (tmp_path/"words.pt").write_text("words")
    for name in ("plain", "bomb", "hidden", "dict", "flat", "int", "cut", "zero", "words"):
        with pytest.raises(ValueError) as e: scan_latent(tmp_path/f"{name}.pt")
        assert f"{name}.pt" in str(e.value) and "\n" not in str(e.value), str(e.value)
    assert not marker.exists()
    for value in (math.nan, math.inf):
        bad = stored.clone()
        bad[4, 1, 2, 3] = value
        torch.save(bad, tmp_path/"bad.pt")
        assert scan_latent(tmp_path/"bad.pt") == [9, 4, 32, 32] and read_latent(tmp_path/"bad.pt", [3, 5]).isfinite().all()
        with pytest.raises(ValueError, match="bad.pt has values that are not finite in frame 4"): read_latent(tmp_path/"bad.pt", [3, 4])
        with pytest.raises(ValueError, match="not finite"): scan_latent(tmp_path/"bad.pt", decode=True)


def test_index_survives_kills_and_sees_changes(tmp_path):
    files = [tmp_path/f"{i}.txt" for i in range(30)]
    for i, f in enumerate(files): f.write_text("x"*i)
    looked = []
    def scan(path, stop=None):
        if len(looked) == stop: raise KeyboardInterrupt
        looked.append(path)
        return os.path.getsize(path)
    cache, sizes = tmp_path/"cache"/"index.jsonl", {str(f): dict(found=i) for i, f in enumerate(files)}
    with pytest.raises(KeyboardInterrupt): index_files(files, lambda p: scan(p, 11), cache, n_workers=1, every=0.)
    before = len(looked)
    assert index_files(files, scan, cache, n_workers=1) == sizes
    assert len(looked) <= 30 + 1 and before == 11 # only the one in hand is looked into twice
    whole = cache.read_bytes()
    for cut in range(len(whole) - 200, len(whole), 7): # killed at any byte of an append
        cache.write_bytes(whole[:cut])
        assert index_files(files, scan, cache) == sizes
    count = len(looked)
    files[3].write_text("changed")
    assert index_files(files, scan, cache)[str(files[3])] == dict(found=7) and len(looked) == count + 1
    os.utime(files[4], (1, 1))
    files[5].unlink()
    found = index_files(files, lambda p: os.path.getsize(p) if os.path.exists(p) else scan_video(p), cache)
    assert found[str(files[4])] == dict(found=4) and "is missing" in found[str(files[5])]["error"]
    for i in range(70): # a file that keeps changing does not make the index grow for ever
        files[6].write_text("y"*i)
        index_files(files, scan, cache)
    assert len(cache.read_text().splitlines()) <= 62


def test_index_after_kill_9(tmp_path):
    for i in range(150): write_video(tmp_path/f"v/{i}.mp4", fake_video(2, 16))
    script = ("import sys, time; from defi_nb.core import video as decode; slow = decode.scan_video\n"
              "def scan(p): time.sleep(.02); return len(slow(p))\n"
              f"print('go', flush=True); decode.index_files([f'{tmp_path}/v/{{i}}.mp4' for i in range(150)], scan, '{tmp_path}/index.jsonl', n_workers=1, every=.1)")
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=ENV)
    child.stdout.readline()
    for _ in range(600):
        if (tmp_path/"index.jsonl").exists() and len((tmp_path/"index.jsonl").read_text().splitlines()) > 20: break
        time.sleep(.05)
    child.kill()
    child.wait()
    done, looked = len((tmp_path/"index.jsonl").read_text().splitlines()), []
    assert 20 < done < 150
    found = index_files([tmp_path/f"v/{i}.mp4" for i in range(150)], lambda p: looked.append(p) or len(scan_video(p)), tmp_path/"index.jsonl")
    assert len(looked) == 150 - done and all(v == dict(found=2) for v in found.values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("clips")
    for i, (hz, g) in enumerate(((10, 10), (30, 250), (3, 1))): write_video(root/f"push_the_block_{i}.mp4", fake_video(40), hz=hz, g=g)
    return root


def test_batches_are_the_same_everywhere(folder):
    ds = VideoDataset(index_clips(read_folder(folder)), (0, .5), stride_seconds=.3, min_left_seconds=.5, size=32)
    everything = ds[:]
    check_batch(everything, DataSpec(image_size=32))
    one_by_one = torch.cat([ds[i].video for i in range(len(ds))])
    assert torch.equal(everything.video, one_by_one)
    order = np.random.default_rng(0).permutation(len(ds))
    assert torch.equal(ds[order].video, one_by_one[order]) and torch.equal(ds[torch.from_numpy(order)].video, one_by_one[order])
    assert torch.equal(ds[-1].video, one_by_one[-1:])
    for context in ("fork", "spawn"):
        loader = DataLoader(ds, sampler=np.array_split(order, 5), batch_size=None, num_workers=2, multiprocessing_context=context)
        assert torch.equal(torch.cat([b.video for b in loader]), one_by_one[order])
    with pytest.raises(IndexError): ds[len(ds)]


def test_fit_trains_from_it(folder):
    class Toy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Linear(3, 3)
        def loss(self, batch):
            x = batch.video.float().mean((1, 4, 5))/255
            loss = (self.w(x[:, 0]) - x[:, 1]).square().mean()
            return loss, {}
    ds, cfg = VideoDataset(index_clips(read_folder(folder)), (0, 1), .5, 1, size=16), TrainConfig(steps=6, batch_size=4, log_every=1)
    def run(workers):
        torch.manual_seed(0)
        return [row["loss"] for row in fit(Toy(), ds, replace(cfg, num_workers=workers))]
    assert run(0) == run(2)


def test_hostile_annotations(tmp_path):
    notes = {"1": "{", "2": "[]", "3": "null", "4": dict(texts=["a"], videos=[dict(video_path="/etc/passwd")]), "5": dict(texts=["a"], videos=[dict(video_path="../../x.mp4")]),
             "6": dict(texts=["a"], videos=[dict(video_path="gone.mp4")], state=[1]), "7": dict(texts=[], videos=[dict(video_path="a.mp4")]),
             "8": dict(texts=["a"], videos=[dict(video_path="a.mp4")], video_length=41), "9": dict(texts=["a"], videos=[dict(video_path="a.mp4")], video_length=40),
             "10": dict(texts=["a"], videos=3), "11": dict(texts=["a"], state=[1]*40)}
    (tmp_path/"annotation/train").mkdir(parents=True)
    for name, note in notes.items(): (tmp_path/f"annotation/train/{name}.json").write_text(note if isinstance(note, str) else json.dumps(note))
    write_video(tmp_path/"a.mp4", fake_video(40))
    skip = Skipped()
    kept = index_clips(read_annotations(tmp_path, on_problem=skip), on_problem=skip)
    assert [c.id for c in kept] == ["9"] and sorted(skip, key=int) == ["1", "2", "3", "4", "5", "6", "7", "8", "10", "11"]
    assert all("\n" not in why for why in skip.values())
    with pytest.raises(ValueError, match="1.json is damaged"): read_annotations(tmp_path)


def test_hostile_lists(tmp_path):
    write_video(tmp_path/"a.mp4", fake_video(3))
    (tmp_path/"bad.csv").write_bytes(b"file_name,text\na.mp4,caf\xe9\n")
    (tmp_path/"bad.jsonl").write_text('{"file_name": "a.mp4", "text": "a"}\n{"file_na')
    (tmp_path/"list.jsonl").write_text("[1, 2]\n")
    for name in ("bad.csv", "bad.jsonl", "list.jsonl"):
        with pytest.raises(ValueError, match=name): read_folder(tmp_path, name)
    (tmp_path/"labels").mkdir()
    (tmp_path/"labels/train.json").write_text(json.dumps([dict(label="x"), 3, dict(id=5, label="y")]))
    skip = Skipped()
    assert [c.id for c in read_something(tmp_path, on_problem=skip)] == ["5"] and len(skip) == 2
    (tmp_path/"narration.json").write_text(json.dumps({"a": {"narration_pass_1": {"narrations": [dict(timestamp_sec="soon")]}}}))
    with pytest.raises(ValueError, match="not in Ego4D's form"): read_ego4d(tmp_path, tmp_path/"narration.json")
    (tmp_path/"narration.json").write_text(json.dumps({"videos": {}}))
    with pytest.raises(ValueError, match="has no narrations of a"): read_ego4d(tmp_path, tmp_path/"narration.json")


def test_nearest_is_nearest():
    rng = np.random.default_rng(0)
    for n in (1, 2, 3, 50):
        times = np.sort(rng.uniform(0, 10, n))
        wanted = rng.uniform(-1, 11, 100)
        assert nearest(times, wanted).tolist() == [int(np.abs(times - t).argmin()) for t in wanted]
    for hz in (3, 29.97, 30, 24, 12.5): # stamps rounded to a tick do not shift a frame
        times = np.round(np.arange(200)/hz, 3)
        assert nearest(times, np.arange(200)/hz).tolist() == list(range(200))


@real
def test_real_clips():
    for name, hz in (("bridge", 3), ("rt1", 3)):
        clips = index_clips(read_annotations(REAL/name, "val"))
        assert len(clips) == 4 and all(c.text for c in clips)
        for clip in clips:
            path, info = clip.videos["0"], clip.info["0"]
            assert len(json.loads((REAL/name/f"annotation/val/{clip.id}.json").read_text())["state"]) == clip.frames == len(info)
            with av.open(str(path)) as file: sequential = np.stack([f.to_ndarray(format="rgb24") for f in file.decode(video=0)])
            rows = np.random.default_rng(0).integers(0, len(info), 12)
            assert (read_frames(path, rows, info) == sequential[rows]).all()
            np.testing.assert_allclose(np.diff(info.times), 1/hz, atol=1e-3)
        ds = VideoDataset(clips, offsets_seconds=(0, 1), stride_seconds=1/3, min_left_seconds=1, size=64)
        assert all((rows[1] - rows[0]) == hz for _, rows, _ in map(ds.sample, range(len(ds))))
        assert len(ds) == sum(c.frames - hz for c in clips)
        check_batch(ds[[0, len(ds) - 1]], DataSpec.tiny())


@real
def test_real_latents():
    found = read_annotations(REAL/"bridge", "val", latent_fallback="latent_videos_svd")
    with pytest.raises(ValueError, match="0.pt is missing"): index_clips(read_annotations(REAL/"bridge", "val"), video=False, latent=True)
    clips = index_clips(found, latent=True, decode=True)
    ds = VideoDataset(clips, sampling=WholeClip(), size=256, latent=True)
    assert len(ds) == 4 and ds.left_out == []
    batch = ds[:]
    assert batch.video.shape == (4, 1, 16, 3, 256, 256) and batch.latent.shape == (4, 1, 16, 4, 32, 32)
    for i, clip in enumerate(clips):
        stored = torch.load(clip.latents["0"], weights_only=True)
        rows = np.linspace(0, len(stored) - 1, 16).astype(int)
        torch.testing.assert_close(batch.latent[i, 0]*.18215, stored[rows])
    assert 3 < batch.latent.std() < 6 # the VAE's own scale, not the scaled one
    assert len(VideoDataset(clips, sampling=EveryOther(), latent=True, video=False)) == sum(-(-c.frames//2) for c in clips)
