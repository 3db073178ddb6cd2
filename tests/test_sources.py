"Any format becomes samples that all stages learn from; preparation survives kill -9, is shared by processes, and is never stale."
import hashlib
import json
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ENV
from warm import processes

from defi_nb.core.video import fake_video, write_video
from defi_nb.models.encoders import load_encoders
from defi_nb.data.episodes import fake_frames
from defi_nb.models.gfdm import GFDM, GFDMConfig, fit_encoders
from defi_nb.models.gidm import GIDM, GIDMConfig
from defi_nb.weights.load import load_to_act, model_info
from defi_nb.data.csv_folder import write_csv_folder
from defi_nb.models.policy import CoupledPolicy, PlainConfig, PlainPolicy, PolicyConfig
from defi_nb.data.cache import encode_samples, keep_texts
from defi_nb.data.robot_dataset import RobotSamples
from defi_nb.run.datasets import policy_data, reading_of, video_data
from defi_nb.data.cache import shard_rows
from defi_nb.data.episodes import Reading
from defi_nb.data.load import DatasetRef, open_dataset, parse_data_spec
from defi_nb.train.metrics import MixtureLog
from defi_nb.core.spec import CONTROL_HZ, DataSpec
from defi_nb.train.config import TrainConfig
from defi_nb.train.fit import fit

FIXTURES = Path(__file__).parent/"fixtures"
REAL = next((p for p in (Path(__file__).resolve().parents[i]/"shared"/"data" for i in (2, 3)) if p.is_dir()), Path("no real data"))
SPEC = DataSpec.tiny()
CFG = TrainConfig(steps=2, batch_size=2, warmup=1, device="cpu", log_every=1)
CLIP_TIMES = tuple(i*SPEC.frame_stride/CONTROL_HZ for i in range(SPEC.frames))


@pytest.fixture(scope="module")
def encoders(): return load_encoders("tiny")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A project with small data of every format that can be made here."
    root = tmp_path_factory.mktemp("sources")
    (root/"nbs").mkdir()
    (root/"settings.ini").write_text("[DEFAULT]\n")
    for name in ("lerobot_v21", "lerobot_v30", "rlds"):
        with zipfile.ZipFile(FIXTURES/f"{name}.zip") as z: z.extractall(root/name)
    (root/"rlds/toy_robot").rename(root/"toy_robot")
    for i in range(4): write_video(root/"videos"/f"push_the_button_{i}.mp4", fake_video(24, start=40*i), hz=12)
    something(root/"ssv2")
    ego4d(root/"ego4d")
    def episode(i): return dict(name=f"ep{i}", text="wave slowly", video=dict(front=fake_video(25, start=30*i)), action=np.cumsum(np.random.default_rng(i).normal(size=(25, 3)), 0))
    write_csv_folder(root/"lab", map(episode, range(4)), ("shoulder", "elbow", "wrist"), 10)
    calvin(root/"task_D_D")
    return root


def something(root):
    labels = [dict(id=str(i), label=f"pushing a cup {i}", template="Pushing [something]", placeholders=["a cup"]) for i in range(3)]
    (root/"labels").mkdir(parents=True)
    (root/"labels/train.json").write_text(json.dumps(labels))
    for i in range(3): write_video(root/"20bn-something-something-v2"/f"{i}.webm", fake_video(24, start=50*i), hz=12, codec="libvpx-vp9")


def ego4d(root):
    notes = [dict(timestamp_sec=t, narration_text="#C C picks up a cup") for t in (1., 2.5)]
    (root/"annotations").mkdir(parents=True)
    (root/"annotations/narration.json").write_text(json.dumps({u: dict(narration_pass_1=dict(narrations=notes)) for u in "ab"}))
    for u in "ab": write_video(root/"clips"/f"{u}.mp4", fake_video(60), hz=15)


def calvin(root):
    from defi_nb.data.record import finish_split, write_segment
    from defi_nb.data.episodes import Window
    frames, n = fake_frames({"open_drawer": 2, "turn_on_led": 2}, length=12, image_size=64), 48
    arrays = dict(rel_actions=frames.action, robot_obs=frames.robot_obs, scene_obs=frames.scene_obs, **{f"rgb_{v}": x for v, x in frames.video.items()})
    write_segment(root/"training", 0, {k: v[:n] for k, v in arrays.items()}, "D", [Window(w.start, w.end, w.task, w.text, "D") for w in frames.windows])
    finish_split(root/"training")


FORMATS = { # text of a run parameter -> hz that has to be said, number of cameras
    "videos": (0., 1), "ssv2": (0., 1), "ego4d": (0., 1), "lab": (0., 1), "task_D_D": (0., 2), "lerobot_v21": (0., 2), "lerobot:lerobot_v30": (0., 2), "rlds:toy_robot": (5., 2)}


@pytest.mark.parametrize("where", FORMATS)
def test_each_format_through_each_stage(made, encoders, where, monkeypatch):
    "One step of GFDM, GIDM and, where there are actions, of both policies."
    monkeypatch.chdir(made)
    hz, cameras = FORMATS[where]
    reading = reading_of(hz=hz)
    latents, _, pieces = video_data(where, "", "latent", encoders, CFG, CLIP_TIMES, reading=reading, unchecked=True)
    assert latents[[0, 1]].latent.shape == (2, cameras, SPEC.frames, 16, 8, 8) and all(t.strip() for p in pieces for t in p.texts)
    torch.manual_seed(0)
    gfdm = GFDM(fit_encoders(GFDMConfig.tiny(), encoders, SPEC), encoders.clip)
    assert np.isfinite(fit(gfdm, latents, CFG)[-1]["loss"])
    pairs, _, _ = video_data(where, "", "dino", encoders, CFG, lambda p: (0, p.gap), reading=reading, unchecked=True)
    gidm = GIDM(GIDMConfig.tiny(), encoders.t5)
    assert np.isfinite(fit(gidm, pairs, CFG)[-1]["loss"])
    if not pieces[0].data.actions:
        with pytest.raises(ValueError, match="a policy learns from one dataset with actions"): policy_data(where, "latent", encoders, CFG, reading=reading, unchecked=True)
        return
    demo = policy_data(where, "latent", encoders, CFG, reading=reading, unchecked=True)
    adapter = PolicyConfig().adapter if demo.scale is None else replace(PolicyConfig().adapter, action_dim=len(demo.labels), proprio_dim=0)
    coupled = CoupledPolicy(replace(PolicyConfig(feature_dim=gfdm.feature_shape()[-1]), adapter=adapter, views=("static", "gripper")[:cameras]), encoders, gfdm)
    plain = PlainPolicy(replace(PlainConfig(latent_channels=16), adapter=replace(adapter, latent_dim=0)), encoders)
    for policy in (coupled, plain):
        assert np.isfinite(fit(policy, demo.train, CFG)[-1]["loss"])
        assert policy.act(demo.held[[0]]).shape == (1, SPEC.chunk, adapter.action_dim)


def test_the_scale_is_kept_with_the_checkpoint(made, encoders, monkeypatch, tmp_path):
    monkeypatch.chdir(made)
    demo = policy_data("lab", "latent", encoders, CFG, unchecked=True)
    plain = PlainPolicy(replace(PlainConfig(latent_channels=16), adapter=replace(PlainConfig().adapter, action_dim=3, proprio_dim=0)), encoders)
    from dataclasses import asdict
    fit(plain, demo.train, CFG, out=tmp_path/"policy", info=model_info(plain, encoders, preset="tiny", action_scale=asdict(demo.scale)))
    policy = load_to_act(tmp_path/"policy")
    assert policy.action_scale == demo.scale
    seen = RobotSamples(demo.dataset.data, size=64)[[0]]
    low, high = np.array(demo.scale.low), np.array(demo.scale.high)
    acted = policy.action_scale.undo(policy.act(seen))
    assert acted.shape == (1, SPEC.chunk, 3) and (acted >= low - 1e-4).all() and (acted <= high + 1e-4).all()


@pytest.mark.skipif(not REAL.is_dir(), reason="no real recordings here")
@pytest.mark.parametrize("folder,times", [("real_clips/bridge", CLIP_TIMES), ("real_clips/rt1", (0., 1.)), ("calvin_mini", (0., 1/3))])
def test_real_recordings(made, encoders, folder, times, monkeypatch):
    monkeypatch.chdir(made)
    train, held, pieces = video_data(str(REAL/folder), "", "latent", encoders, CFG, times, unchecked=True)
    batch = train[[0, len(train) - 1]]
    assert batch.latent.shape == (2, len(pieces[0].views), len(times), 16, 8, 8) and batch.latent.isfinite().all() and len(held)


@pytest.mark.skipif(not REAL.is_dir(), reason="no real recordings here")
def test_stored_latents_are_used_where_they_fit(made, encoders, monkeypatch):
    "Bridge's own latents are those of the full-size VAE."
    monkeypatch.chdir(made)
    class Full:
        channels, downsampling, encode = 4, 8, None
    large = replace(encoders, vae=Full())
    large.identity, large.to = (lambda: dict(vae="full")), (lambda device: large)
    train, _, _ = video_data(str(REAL/"real_clips/bridge"), "", "latent", large, CFG, (0., .2), preset="paper", unchecked=True)
    assert train[[0]].latent.shape == (1, 1, 2, 4, 32, 32) and .3 < train[:4].latent.std()*.18215 < 3


def test_latents_without_videos(made, encoders, monkeypatch):
    "Tiny's own latents in the release's format: read by its rule without seconds, and refused where their rate or their shape does not do."
    monkeypatch.chdir(made)
    root = made/"stored"
    (root/"annotation/train").mkdir(parents=True)
    for i in range(3):
        (root/"latent_videos/train"/str(i)).mkdir(parents=True)
        torch.save(torch.full((20, 16, 8, 8), float(i)), root/f"latent_videos/train/{i}/0.pt")
        note = dict(texts=["lift the cup"], video_length=20, latent_videos=[dict(latent_video_path=f"latent_videos/train/{i}/0.pt")], videos=[])
        (root/f"annotation/train/{i}.json").write_text(json.dumps(note))
    train, _, _ = video_data("stored", "", "latent", encoders, CFG, CLIP_TIMES, reading=Reading(sampling="release"), unchecked=True)
    batch = train[[0, len(train) - 1]]
    assert len(train) == 2*10 and batch.latent.shape == (2, 1, SPEC.frames, 16, 8, 8) # every second frame begins a sample
    with pytest.raises(ValueError, match="rate, hz"): video_data("stored", "", "latent", encoders, CFG, CLIP_TIMES, unchecked=True)
    assert len(video_data("stored", "", "latent", encoders, CFG, CLIP_TIMES, reading=Reading(hz=10.), unchecked=True)[0]) == 2*20
    with pytest.raises(ValueError, match="has latents and no videos"): video_data("stored", "", "dino", encoders, CFG, (0., 1.), reading=Reading(hz=10.), unchecked=True)


def test_a_mixture_is_resumable_and_its_shares_are_logged(made, encoders, monkeypatch, tmp_path):
    monkeypatch.chdir(made)
    cfg = replace(CFG, steps=40, batch_size=16, save_every=1000)
    train, _, pieces = video_data("videos*1, rlds:toy_robot*3", "", "latent", encoders, cfg, (0., .2), reading=Reading(hz=5.), unchecked=True)
    assert len(train) == 640 and train.shares == dict(videos=.25, toy_robot=.75) and train[[0]].latent.shape[1] == 1 # as many cameras as both have
    class Toy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(()))
        def loss(self, batch): return (self.w - batch.latent.mean()).square(), {}
    def rows(out, steps, hook=()): return fit(Toy(), train, replace(cfg, steps=steps, schedule="constant", log_every=5), out=tmp_path/out, on_log=hook)
    log = MixtureLog(train, cfg)
    whole = rows("whole", 40, log)
    assert abs(whole[-1]["share_videos"] - .25) < .02 and abs(log.shares()["toy_robot"] - .75) < .02
    class Stop(Exception): pass
    def stop(row):
        if row["step"] == 20: raise Stop
    with pytest.raises(Stop): fit(Toy(), train, replace(cfg, schedule="constant", log_every=5, save_every=10), out=tmp_path/"cut", on_log=stop)
    again = fit(Toy(), train, replace(cfg, schedule="constant", log_every=5, save_every=10), out=tmp_path/"cut")
    assert [r["loss"] for r in again] == [r["loss"] for r in whole]


def test_named_mixtures_say_what_is_missing(made, capsys):
    (made/"mix").mkdir()
    (made/"mix/ssv2").symlink_to(made/"ssv2")
    (made/"mix/bridge").symlink_to(made/"videos")
    pieces = [open_dataset(a, 64) for a in parse_data_spec(f"release_gfdm:{made}/mix")]
    assert [(p.name, p.weight) for p in pieces] == [("ssv2", .4), ("bridge", .2)]
    assert "missing are fractal, calvin_abc" in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds none of"): parse_data_spec(f"table_12:{made}/videos")


def test_what_does_not_fit_is_named(made, encoders, monkeypatch):
    monkeypatch.chdir(made)
    for where, reading, said in (("rlds:toy_robot", Reading(), "give hz"), ("lab", Reading(columns=("knee",)), "no column 'knee'"), ("videos", Reading(cameras=("top",)), "no camera 'top'"),
                                 ("videos*1, lab", Reading(), "give a weight to each"), ("nothing/here", Reading(), "is not there")):
        with pytest.raises(ValueError, match=said): video_data(where, "", "latent", encoders, CFG, (0.,), reading=reading, unchecked=True)


# -- preparation --

def slow_rows(lo, hi):
    time.sleep(.008)
    return np.arange(lo, hi)[:, None]*np.ones(4)


def prepare(folder, n_workers=1): shard_rows(Path(folder)/"rows", 1000, slow_rows, dict(of="slow"), 10, n_workers, np.float32, 50)


def shards_in(folder): return len(list(folder.glob("rows-*/*.npy")))


def contents(folder): return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*.npy"))}


def start(folder, *args):
    process = processes.Process(target=prepare, args=(folder, *args))
    process.start()
    return process


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    prepare(folder)
    return contents(folder)


@pytest.mark.parametrize("n_workers", [1, 2])
def test_preparation_killed_again_and_again(tmp_path, whole, n_workers):
    kept, kills = {}, 0
    for goal in (2, 7, 11, 16):
        process, end = start(tmp_path, n_workers), time.monotonic() + 60
        while process.is_alive() and shards_in(tmp_path) < goal and time.monotonic() < end: time.sleep(.003)
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        now = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.npy")}
        assert now.items() >= kept.items() and all(whole[p.name] == hashlib.sha256(p.read_bytes()).hexdigest() for p in now) # nothing half written, nothing made again
        kept = now
    assert kills >= 3
    prepare(tmp_path)
    assert contents(tmp_path) == whole and not [p for p in tmp_path.rglob("*") if p.suffix == ".tmp" or p.name == ".locks"]


def test_processes_share_the_work(tmp_path, whole):
    "Three at once, one of which is killed: the others take over, and the bytes are the same."
    began = time.monotonic()
    many = [start(tmp_path) for _ in range(3)]
    while shards_in(tmp_path) < 5 and time.monotonic() < began + 60: time.sleep(.005)
    many[0].kill()
    for p in many: p.join()
    assert [p.exitcode for p in many] == [-signal.SIGKILL, 0, 0] and contents(tmp_path) == whole


COUNTING = """
import os, sys, numpy as np
from defi_nb.data.cache import shard_rows
def compute(lo, hi):
    with open(sys.argv[2], "a") as f: f.write(f"{lo}\\n")
    import time; time.sleep(.01)
    return np.arange(lo, hi)[:, None]
shard_rows(sys.argv[1], 600, compute, dict(of="count"), 10, 1, np.float32, 50)
"""


def test_no_shard_is_made_twice(tmp_path):
    run = [subprocess.Popen([sys.executable, "-c", COUNTING, str(tmp_path/"rows"), str(tmp_path/f"log{i}")], env=ENV) for i in range(2)]
    assert [p.wait() for p in run] == [0, 0]
    made = [[int(x) for x in (tmp_path/f"log{i}").read_text().split()] if (tmp_path/f"log{i}").exists() else [] for i in range(2)]
    counted = sorted(made[0] + made[1])
    counted.remove(0) # the row that showed how large a row is
    assert counted == list(range(0, 600, 10))


def test_a_stale_key_is_never_read(tmp_path, capsys):
    film = write_video(tmp_path/"v"/"open_it_1.mp4", fake_video(12), hz=12)
    calls = []
    def encode(x): calls.append(len(x)); return x.float().mean((-1, -2))
    def codes(identity="one", size=32):
        piece = open_dataset(DatasetRef(tmp_path/"v", name="v"), size)
        return encode_samples([piece.samples(size=size)], encode, "latent", [tmp_path/"codes"], identity)[0]
    first = codes()
    calls.clear()
    assert (codes()[:].latent == first[:].latent).all() and sum(calls) == 1 # the one that shows how much it would take
    for change in (lambda: codes("another encoder"), lambda: codes(size=16)):
        calls.clear()
        change()
        assert sum(calls) >= 12
    write_video(film, fake_video(12, start=99), hz=12)
    assert (codes()[:].latent != first[:].latent).any()
    assert "not used here" in capsys.readouterr().out


@pytest.mark.parametrize("bytes_", [100, 3000])
def test_a_full_disk_is_said_and_leaves_nothing_half_written(tmp_path, bytes_):
    "A limit on the size of files stands for a full disk; the same call later goes on."
    def compute(lo, hi): return np.ones((hi - lo, 100))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    shard_rows(tmp_path/"rows", 1, compute, dict(of=1))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    folder = next(tmp_path.glob("rows-*"))
    shutil.rmtree(folder)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
        with pytest.raises(ValueError, match="cannot grow"): shard_rows(tmp_path/"rows", bytes_, compute, dict(of=2))
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".npy", ".tmp")]
    assert len(shard_rows(tmp_path/"rows", bytes_, compute, dict(of=2))) == bytes_


def test_too_small_a_disk_is_refused_before_it_begins(tmp_path, monkeypatch):
    import collections

    from defi_nb.data import cache
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: collections.namedtuple("u", "total used free")(10**6, 10**6 - 500, 500))
    calls = []
    def compute(lo, hi): calls.append(lo); return np.ones((hi - lo, 100))
    with pytest.raises(ValueError, match=r"200 rows of 200 bytes, 40 kB in all, and the disk has 500 bytes"): shard_rows(tmp_path/"rows", 200, compute, dict(of=1))
    assert calls == [0] and not list(tmp_path.rglob("*.npy"))


def test_noise_belongs_to_the_shard(tmp_path):
    "A network that draws noise gives the same bytes, however often it was interrupted."
    def noisy(stop):
        def compute(lo, hi):
            if lo == stop: raise KeyboardInterrupt
            return torch.randn(hi - lo, 3)
        return compute
    def rows(name, stop=None): return shard_rows(tmp_path/name/"rows", 300, noisy(stop), dict(of="noise"), 10, most_rows=50)
    with pytest.raises(KeyboardInterrupt): rows("cut", 120)
    torch.manual_seed(9)
    assert (rows("cut")[:] == rows("whole")[:]).all()


def test_sentences_are_kept_bit_for_bit(tmp_path, encoders):
    texts = ["open the drawer", "push the red button, please", "lift"]
    for name in ("clip", "t5"):
        plain, kept = getattr(load_encoders("tiny"), name), getattr(load_encoders("tiny"), name)
        keep_texts(kept, texts, tmp_path/name, encoders.identity()[name])
        kept.model.forward = None # it is not asked again
        theirs, ours = plain(texts), kept(texts)
        theirs, ours = (vars(theirs).values(), vars(ours).values()) if name == "clip" else (theirs, ours)
        assert all(torch.equal(a, b) for a, b in zip(theirs, ours))


def test_a_child_run_is_no_rank_of_its_parent(toy, monkeypatch):
    "The notebook that makes a missing checkpoint must not wait for the other processes of the training that misses it."
    from defi_nb.run import cli
    monkeypatch.chdir(toy)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_MIXED_PRECISION"): monkeypatch.setenv(name, "1")
    class Started(Exception): pass
    def popen(*args, env, **kw):
        assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_MIXED_PRECISION"} & env.keys() and "PATH" in env
        raise Started
    monkeypatch.setattr(cli.subprocess, "Popen", popen)
    with pytest.raises(Started): cli.run_notebook("count", {}, "runs/count")
