"Files of TensorFlow Datasets' own writer are read exactly, and broken ones are named (tests/fixtures)."
import json
import multiprocessing
import pickle
import resource
import shutil
import struct
import zipfile
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import torch

from defi_nb.data.rlds import RLDSFolder, RLDSKeys, index_split, read_features
from defi_nb.data.robot_dataset import RobotSamples, measure_scale
from defi_nb.data.rlds import (
    decode_example, encode_example, read_record, scan_records, write_records)

FIXTURES = Path(__file__).parent/"fixtures"
KEYS = RLDSKeys(dict(front="observation/image", wrist="observation/wrist_image"), "language_instruction", hz=5, proprio=("observation/state",),
                action=("action/world_vector", "action/rotation_delta", "action/gripper"))


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rlds")
    with zipfile.ZipFile(FIXTURES/"rlds.zip") as z: z.extractall(folder)
    return folder/"toy_robot/1.0.0"


@pytest.fixture
def broken(toy, tmp_path): return shutil.copytree(toy, tmp_path/"1.0.0") # a copy to break


def shards(folder): return sorted(folder.glob("*-train.tfrecord-*"))


def everything(folder): # samples of all episodes
    source = RLDSFolder(folder, KEYS, keep_unlabelled=True)
    return RobotSamples(source, times=(0, .4), chunk=3, size=24, scale=measure_scale(source, "min_max"))[:]


@pytest.mark.parametrize("split", ["train", "val"])
def test_equals_what_tensorflow_datasets_reads(toy, split):
    theirs, source = np.load(toy.parent.parent/"expected.npz"), RLDSFolder(toy, KEYS, split, keep_unlabelled=True)
    assert len(source.lengths) == len({k.split("/")[1] for k in theirs if k.startswith(split)})
    for e, n in enumerate(source.lengths):
        expected = lambda key: theirs[f"{split}/{e}/{key}"] # noqa: B023
        action, proprio = source.vectors(e)
        assert n == len(expected("is_first")) and (proprio == expected("observation/state")).all()
        assert (action == np.concatenate([expected(k) for k in KEYS.action], 1).astype(np.float32)).all()
        assert source.instructions(e, range(n)) == [bytes(x).decode() for x in expected("language_instruction")]
        assert (np.stack(source.read_images(e, range(n), "wrist")) == expected("observation/wrist_image")).all() # PNG
        jpeg = np.stack(source.read_images(e, range(n), "front")).astype(int) - expected("observation/image")
        assert np.abs(jpeg).max() <= 2 # two decoders of JPEG round differently


def test_every_number_of_a_record_equals_tensorflows(toy):
    theirs = np.load(toy.parent.parent/"expected.npz")
    records = [(p, *place) for p in shards(toy) for place in scan_records(p)]
    assert len(records) == 5
    for i, record in enumerate(records):
        example = decode_example(read_record(*record)) # with its checksum
        for key in ("mat", "code", "reward", "is_last", "action/open_gripper", "action/terminate"):
            ours = example[f"steps/{key}/ragged_flat_values" if key == "code" else f"steps/{key}"]
            assert (ours == theirs[f"train/{i}/{key}"].ravel()).all(), key
    features = read_features(toy)
    assert features["steps/mat"] == ("tensor", (2, 2), "int64") and features["steps/code"][0] == "list"
    assert features["steps/observation/image"] == ("image", (24, 32, 3), "uint8") and features["episode_metadata/file_path"][0] == "text"


def test_what_is_written_again_is_the_same_file(toy, tmp_path):
    records = [bytes(read_record(shards(toy)[0], *place)) for place in scan_records(shards(toy)[0])]
    write_records(tmp_path/"again", records)
    assert (tmp_path/"again").read_bytes() == shards(toy)[0].read_bytes()


def test_tensorflow_reads_what_we_write(tmp_path):
    tf = pytest.importorskip("tensorflow")
    write_records(tmp_path/"ours", [encode_example(dict(a=np.arange(-3, 3), b=[.5, 1], c=["x", b"\xff"]))])
    example = tf.train.Example.FromString(next(iter(tf.data.TFRecordDataset(str(tmp_path/"ours")))).numpy())
    assert list(example.features.feature["a"].int64_list.value) == [-3, -2, -1, 0, 1, 2]


def test_any_order_and_any_process_give_the_same(toy):
    source = RLDSFolder(toy, KEYS, keep_unlabelled=True)
    ds = RobotSamples(source, times=(0, .4), chunk=3, size=24, scale=measure_scale(source, "min_max"))
    whole, order = ds[:], np.random.default_rng(0).permutation(len(ds))
    loader = torch.utils.data.DataLoader(ds, sampler=np.array_split(order, 3), batch_size=None, num_workers=1, multiprocessing_context="spawn")
    batches = list(loader)
    assert (torch.cat([b.video for b in batches]) == whole.video[order]).all() and (torch.cat([b.action for b in batches]) == whole.action[order]).all()
    assert len(pickle.dumps(ds)) < 20_000 # nothing read travels along


def test_empty_language_and_an_episode_of_one_frame(toy):
    source = RLDSFolder(toy, KEYS)
    assert 0 < len(source.lengths) < 5 and all(t.strip() for e in range(len(source.lengths)) for t in source.instructions(e, [0]))
    everyone = RLDSFolder(toy, KEYS, keep_unlabelled=True)
    one = int(np.flatnonzero(everyone.lengths == 1)[0])
    batch = RobotSamples(everyone, times=(0, 1), chunk=3, size=24, scale=measure_scale(everyone), episodes=[one])[:]
    assert len(batch) == 1 and (batch.video[:, :, 0] == batch.video[:, :, 1]).all() and batch.text == [""]


def _index(toy, cache, pipe):
    pipe.send(index_split(shards(toy), "language_instruction", cache))


def test_two_processes_make_one_index(toy, tmp_path):
    context, (here, there) = multiprocessing.get_context("spawn"), multiprocessing.Pipe(False)
    jobs = [context.Process(target=_index, args=(toy, tmp_path, there)) for _ in range(2)]
    for job in jobs: job.start()
    assert here.recv() == here.recv() == index_split(shards(toy), "language_instruction")
    for job in jobs: job.join()
    assert next(tmp_path.glob("*.jsonl")).read_text().count("place") == 2 # one line a shard


def test_a_half_written_index_is_finished(toy, tmp_path):
    whole = index_split(shards(toy), "language_instruction", tmp_path)
    file = next(tmp_path.glob("*.jsonl"))
    text = file.read_bytes()
    for n in range(0, len(text), 37):
        file.write_bytes(text[:n])
        assert index_split(shards(toy), "language_instruction", tmp_path) == whole
        assert all(isinstance(json.loads(line), dict) for line in file.read_bytes()[n:].splitlines()[1:] if line)


@pytest.mark.parametrize("share", [.01, .3, .6, .999])
def test_truncated_shard(broken, share):
    path = shards(broken)[0]
    path.write_bytes(path.read_bytes()[:int(share*path.stat().st_size)])
    with pytest.raises(ValueError, match=f"{path.name}: record . .*cut short; restore a whole copy"): everything(broken)


def test_a_shard_cut_after_it_was_indexed(broken, tmp_path):
    source, path = RLDSFolder(broken, KEYS, cache=tmp_path/"cache", keep_unlabelled=True), shards(broken)[1]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="make the index again"): [source.vectors(e) for e in range(5)]


def test_changed_bytes_are_found_by_the_checksum(broken):
    path, rng = shards(broken)[0], np.random.default_rng(0)
    good = path.read_bytes()
    for at in rng.integers(12, len(good), 20):
        bad = bytearray(good)
        bad[at] ^= 1 << rng.integers(8)
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="checksum|not a tf.train.Example|no steps/language_instruction|cut short|episodes"): everything(broken)


def test_a_huge_length_is_refused_without_memory(broken):
    path, length = shards(broken)[0], struct.pack("<Q", 2**40)
    crc = google_crc32c.value(length)
    masked = struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
    path.write_bytes(length + masked + path.read_bytes()[12:])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=f"needs {2**40} bytes"): everything(broken)
    inner = b"\x0a" + b"\xff"*8 + b"\x01" + b"x"*50 # a valid record whose first field claims 2**56 bytes
    write_records(path, [inner, inner])
    with pytest.raises(ValueError, match=f"{path.name}, byte 12: not a tf.train.Example"): everything(broken)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000 # KB


def test_missing_files(broken):
    shards(broken)[1].unlink()
    with pytest.raises(FileNotFoundError, match="1 of 2 shards of split 'train' are missing, such as toy_robot-train.tfrecord-00001-of-00002"): everything(broken)
    (broken/"features.json").unlink()
    with pytest.raises(FileNotFoundError, match="features.json is missing"): everything(broken)


@pytest.mark.parametrize("name,value,message", [
    ("action/world_vector", lambda n: np.full((n, 3), np.nan), "action 'action/world_vector.0.' of row 0 is nan: repair it, or leave this episode out"),
    ("action/world_vector", lambda n: np.zeros((n, 4)), "action/world_vector has .* numbers; features.json says"),
    ("action/world_vector", lambda n: ["a"]*3*n, "byte strings; features.json says"),
    ("observation/state", lambda n: np.full((n, 8), np.inf), "proprio of row 0"),
    ("observation/image", lambda n: [b"GIF89a nothing"]*n, "is no JPEG or PNG"),
    ("observation/image", lambda n: np.zeros(n), "observation/image has . numbers"),
    ("language_instruction", lambda n: np.zeros(n), "language_instruction has . numbers")])
def test_wrong_types_and_values(broken, name, value, message):
    for path in shards(broken):
        examples = [decode_example(read_record(path, *place)) for place in scan_records(path)]
        write_records(path, [encode_example(e | {f"steps/{name}": value(len(e["steps/is_first"]))}) for e in examples])
    with pytest.raises(ValueError, match=message) as e: everything(broken)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name,text,message", [("dataset_info.json", "{", "is damaged"), ("dataset_info.json", "{}", "not in TensorFlow Datasets' layout"),
    ("dataset_info.json", '{"name": "toy_robot", "fileFormat": "riegeli", "splits": [{"name": "train", "shardLengths": ["1"]}]}', "files of format 'riegeli'"),
    ("features.json", "[]", "not in TensorFlow Datasets' layout"), ("features.json", "{}", "is not in this dataset")])
def test_broken_descriptions(broken, name, text, message):
    (broken/name).write_text(text)
    with pytest.raises(ValueError, match=message): everything(broken)
