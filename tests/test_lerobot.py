"LeRobot's own files are read exactly, and broken ones are named: files of tests/fixtures, written by lerobot."
import json
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from defi_nb.core.video import OpenVideo, write_video
from defi_nb.data.lerobot import LeRobotFolder, stored_scale
from defi_nb.data.robot_dataset import RobotSamples, measure_scale

FIXTURES = Path(__file__).parent/"fixtures"
TOP, WRIST = "observation.images.top", "observation.images.wrist"


@pytest.fixture(scope="module", params=["v21", "v30"])
def toy(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    with zipfile.ZipFile(FIXTURES/f"lerobot_{request.param}.zip") as z: z.extractall(folder)
    return folder


@pytest.fixture
def broken(toy, tmp_path): # a copy to break
    return shutil.copytree(toy, tmp_path/"toy")


def samples(folder, **kw):
    source = LeRobotFolder(folder)
    return RobotSamples(source, **dict(times=(0, .2), chunk=3, size=64, scale=measure_scale(LeRobotFolder(folder), "min_max")) | kw)


def edit(path, column, change):
    table = pyarrow.parquet.read_table(path)
    values = pyarrow.array(change(table[column].to_pylist()))
    pyarrow.parquet.write_table(table.set_column(table.schema.get_field_index(column), column, values), path)


def parquets(folder): return sorted((folder/"data").rglob("*.parquet"))


def mp4s(folder): return sorted((folder/"videos").rglob("*.mp4"))


def test_equals_lerobots_own_reader(toy):
    theirs, ds = np.load(toy/"expected.npz"), samples(toy)
    ours = ds[:]
    assert len(ds) == len(theirs["index"]) == 18 and ours.text == theirs["task"].tolist()
    assert np.abs(ds.scale.undo(ours.action) - theirs["action"]).max() < 1e-6 # they too keep the last action past the end
    assert (ours.proprio.numpy() == theirs["observation.state"]).all()
    assert (ours.video[:, 0].numpy() == theirs[TOP]).all() # every pixel
    source = ds.source
    for (e, t), picture in zip(zip(*ds.locate(slice(None))), theirs[WRIST]):
        assert (source.read_images(e, [t], "wrist")[0].transpose(2, 0, 1) == picture).all()
    assert source.labels == ("x", "y", "z", "roll", "pitch", "yaw", "gripper") and source.hz == 10


def test_any_order_and_any_process_give_the_same(toy):
    ds = samples(toy)
    whole, order = ds[:], np.random.default_rng(0).permutation(18)
    assert (ds[order].video == whole.video[order]).all() and (ds[order].action == whole.action[order]).all()
    loader = torch.utils.data.DataLoader(ds, sampler=np.array_split(order, 3), batch_size=None, num_workers=1, multiprocessing_context="spawn")
    assert (torch.cat([b.video for b in loader]) == whole.video[order]).all()
    assert len(pickle.dumps(ds)) < 20_000 # nothing read travels along


def test_stored_statistics_are_those_of_the_data(toy):
    source = LeRobotFolder(toy)
    stored, measured = stored_scale(source, "min_max"), measure_scale(source, "min_max")
    assert stored.labels == measured.labels and np.allclose([stored.low, stored.high], [measured.low, measured.high])
    if source.info["codebase_version"] == "v3.0": assert np.shape(stored_scale(source).low) == (7,)
    else: pytest.raises(ValueError, stored_scale, source).match("use measure_scale")


def test_opening_reads_no_data(toy, tmp_path):
    shutil.copytree(toy/"meta", tmp_path/"meta")
    assert len(LeRobotFolder(tmp_path).lengths) == 4


def test_an_episode_of_one_frame(toy):
    batch = samples(toy).select([1])[:]
    assert len(batch) == 1 and batch.text == ["open the drawer"]
    assert (batch.video[0, :, 0] == batch.video[0, :, 1]).all() and (batch.action[0, 0] == batch.action[0, 2]).all()


@pytest.mark.parametrize("share", [0, .3, .6, .95])
def test_truncated_parquet(broken, share):
    path = parquets(broken)[0]
    path.write_bytes(path.read_bytes()[:int(share*path.stat().st_size)])
    with pytest.raises(ValueError, match=f"{path.name} is damaged .*restore a whole copy"): samples(broken)


@pytest.mark.parametrize("share", [0, .3, .6, .95])
def test_truncated_video(broken, share):
    path = mp4s(broken)[0]
    ds, theirs = samples(broken), np.load(broken/"expected.npz")[TOP]
    path.write_bytes(path.read_bytes()[:int(share*path.stat().st_size)])
    try: assert (ds[:].video[:, 0].numpy() == theirs).all() and share > .9 # only what follows the frames is cut
    except ValueError as e: assert path.name in str(e) and "restore a whole copy" in str(e) and "\n" not in str(e)


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
def test_a_cut_video_gives_true_frames_or_none(tmp_path, codec): # decoders would patch over the last one
    rng, path = np.random.default_rng(0), tmp_path/"whole.mp4"
    texture = np.kron(rng.integers(0, 256, (10, 10, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    write_video(path, np.stack([np.roll(texture, 5*i, 1) for i in range(20)]), 30, codec, faststart=True)
    data, truth, seen = path.read_bytes(), OpenVideo(path).at(np.arange(20)/30, .01), []
    for cut in rng.integers(2000, len(data), 12):
        (tmp_path/f"{cut}.mp4").write_bytes(data[:cut])
        for i in range(20):
            try: seen.append((OpenVideo(tmp_path/f"{cut}.mp4").at([i/30], .01)[0] == truth[i]).all())
            except ValueError: seen.append(None)
    assert False not in seen and True in seen and None in seen


def test_noise_instead_of_a_video(broken):
    path = mp4s(broken)[0]
    data = bytearray(path.read_bytes())
    at = data.index(b"mdat")
    data[at + 8:at + 400] = np.random.default_rng(0).integers(0, 256, 392, np.uint8).tobytes()
    path.write_bytes(data)
    with pytest.raises(ValueError, match=path.name): samples(broken)[:]


def test_missing_files(broken):
    ds, video, data = samples(broken), mp4s(broken)[0], parquets(broken)[0]
    video.unlink()
    with pytest.raises(FileNotFoundError, match=f"{video.name} is missing"): ds[0]
    assert samples(broken, views=("wrist",))[0].video is not None # the other view is read without it
    data.unlink()
    with pytest.raises(FileNotFoundError, match=f"{data.name} is missing"): LeRobotFolder(broken).vectors(0)
    (broken/"meta/info.json").unlink()
    with pytest.raises(FileNotFoundError, match="info.json is missing"): LeRobotFolder(broken)


def test_wrong_types_and_values(broken):
    path = parquets(broken)[0]
    good = path.read_bytes()
    for column, change, message in (
        ("action", lambda x: [str(v) for v in x], "action has type string"),
        ("action", lambda x: [v[:6] for v in x], "action has 6 numbers a row, meta/info.json says 7"),
        ("action", lambda x: [v[:i % 2 + 1] for i,v in enumerate(x)], "action has"),
        ("action", lambda x: [None] + x[1:], "missing"),
        ("action", lambda x: [[*x[0][:2], float("nan"), *x[0][3:]], *x[1:]], "action 'z' of row 0 is nan: repair it, or leave this episode out"),
        ("observation.state", lambda x: [[float("inf")]*6] + x[1:], "proprio of row 0"),
        ("timestamp", lambda x: [t*2 for t in x], "has time 0.200 s, 0.100 s at 10 rows a second"),
        ("episode_index", lambda x: [7 for _ in x], "are not those of episode 0"),
        ("task_index", lambda x: [99 for _ in x], "task_index 99 of episode 0 is not in meta/tasks"),
        (WRIST, lambda x: [v | dict(bytes=v["bytes"][:50]) for v in x], "is no JPEG or PNG that can be decoded"),
        (WRIST, lambda x: [dict(bytes=None, path="../../secret.png") for v in x], "outside the dataset: it is not read")):
        path.write_bytes(good)
        edit(path, column, change)
        with pytest.raises(ValueError, match=message) as e: samples(broken)[0]
        assert "\n" not in str(e.value) and str(broken) in str(e.value)


def test_a_nan_late_in_the_data_is_met_when_it_is_sampled(broken):
    edit(parquets(broken)[1], "action", lambda x: [[float("nan")]*7])
    with pytest.raises(ValueError, match="episode 1: action 'x' of row 0 is nan"): measure_scale(LeRobotFolder(broken))
    kw = dict(chunk=3, scale=measure_scale(LeRobotFolder(broken), "min_max", episodes=[0, 2, 3]), views=())
    assert np.isfinite(RobotSamples(LeRobotFolder(broken), episodes=[0, 2, 3], **kw)[:].action.numpy()).all()
    ds = RobotSamples(LeRobotFolder(broken), **kw)
    with pytest.raises(ValueError, match="episode 1 from row 0: action 'x' of row 0 is nan: repair it, or leave this episode out"): ds[:]


def test_empty_language(broken):
    if (broken/"meta/tasks.jsonl").exists():
        rows = [json.loads(line) for line in (broken/"meta/episodes.jsonl").read_text().splitlines()]
        rows[0]["tasks"], rows[2]["tasks"] = [" "], []
        (broken/"meta/episodes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else: edit(next((broken/"meta/episodes").rglob("*.parquet")), "tasks", lambda x: [[" "], x[1], [], x[3]])
    assert samples(broken)[:].text == ["open the drawer"] + ["lift the block"]*4
    assert len(LeRobotFolder(broken, keep_unlabelled=True).lengths) == 4


def test_a_video_of_other_frames(broken): # shorter than its episodes
    first, *_, last = mp4s(broken)
    if len(mp4s(broken)) > 2: shutil.copy(mp4s(broken)[1], first) # v2.1: the video of the one-frame episode
    else: shutil.copy(last, first)
    with pytest.raises(ValueError, match="has no frame at .*its end was met first.*cut short or does not belong"): samples(broken)[:]


@pytest.mark.parametrize("text,message", [("{", "is damaged"), ("{}", "lacks"), ('{"codebase_version": "v9.0", "fps": 1, "features": {}, "data_path": ""}', "version 'v9.0'"),
    ('{"codebase_version": "v3.0", "fps": 0, "features": {}, "data_path": ""}', "fps is 0")])
def test_broken_info(broken, text, message):
    (broken/"meta/info.json").write_text(text)
    with pytest.raises(ValueError, match=message): LeRobotFolder(broken)


def test_broken_tables(broken):
    for path in (p for p in (broken/"meta").rglob("*") if p.suffix in (".parquet", ".jsonl") and "stats" not in p.name):
        good = path.read_bytes()
        path.write_bytes(good[:len(good)//2])
        with pytest.raises(ValueError, match=f"{path.name}(, line .+)? is damaged|not in LeRobot's layout|info.json says"): LeRobotFolder(broken)
        path.write_bytes(good)


def test_a_clip_goes_on_after_an_error(toy):
    clip = OpenVideo(mp4s(toy)[0])
    good = clip.at([0, .1], .05)
    with pytest.raises(ValueError): clip.at([99.], .05)
    assert all((a == b).all() for a,b in zip(good, clip.at([0, .1], .05)))
