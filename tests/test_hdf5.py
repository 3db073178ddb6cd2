"LIBERO's demonstrations as distributed: one HDF5 file a task, read upright, in workers, and with errors that name the file."
import json
import pickle
from concurrent.futures import ProcessPoolExecutor

import h5py
import numpy as np
import pytest
from warm import defi_nb

from defi_nb.data.episodes import Reading
from defi_nb.data.lerobot import open_lerobot, write_lerobot
from defi_nb.data.load import detect_format, load_dataset
from defi_nb.data.rlds import HDF5Folder, open_hdf5
from defi_nb.doctor.examine import examine


def write_task(path, text="open the drawer", lengths=(30, 25), convention="opengl", size=16):
    "A file with the groups, arrays and attributes of the distributed ones."
    rng = np.random.default_rng(len(text))
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["problem_info"] = json.dumps(dict(problem_name="libero", domain_name="robosuite", language_instruction=text))
        data.attrs["env_args"] = json.dumps(dict(type=1, env_kwargs=dict(control_freq=20)))
        data.attrs["bddl_file_name"], data.attrs["num_demos"] = f"{text}.bddl", len(lengths)
        if convention: data.attrs["macros_image_convention"] = convention
        for i, n in enumerate(lengths):
            demo, images = data.create_group(f"demo_{i}"), rng.integers(0, 120, (n, size, size, 3)).astype(np.uint8)
            images[:, size//2:], images[:, 0, 0, 0] = images[:, size//2:] + 120, np.arange(n) # the bright sky is stored below
            actions = np.clip(rng.normal(0, .4, (n, 7)).cumsum(0)*.2, -1, 1)
            actions[:, 6] = np.where(np.arange(n) < n//2, -1, 1)
            demo["actions"], demo["rewards"], demo["dones"] = actions, np.zeros(n, np.uint8), np.zeros(n, np.uint8)
            demo.attrs["num_samples"], demo["states"] = n, rng.normal(size=(n, 40))
            pose = rng.normal(size=(n, 6)).cumsum(0)*.01
            given = dict(ee_states=pose, ee_pos=pose[:, :3], ee_ori=pose[:, 3:], gripper_states=rng.normal(size=(n, 2)),
                         joint_states=rng.normal(size=(n, 7)), agentview_rgb=images, eye_in_hand_rgb=255 - images)
            for key, x in given.items(): demo[f"obs/{key}"] = x


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path/"libero_90"
    folder.mkdir()
    write_task(folder/"KITCHEN_SCENE1_open_the_drawer_demo.hdf5", lengths=(30,)*11)
    write_task(folder/"STUDY_SCENE1_pick_up_the_book_demo.hdf5", "pick up the book", (21,))
    return folder


def test_samples_are_upright_and_in_order(folder):
    dataset = load_dataset(str(folder), None)
    source = dataset.data
    assert dataset.format == detect_format(folder) == "hdf5" and len(dataset.units) == 12 and source.hz == 20
    assert dataset.texts == ["open the drawer", "pick up the book"] and source.views == ("agentview_rgb", "eye_in_hand_rgb")
    assert [source.episode_name(e).split("/")[1] for e in (0, 9, 10)] == ["demo_0", "demo_9", "demo_10"] # not as text sorts
    assert source.relative.tolist() == [True]*6 + [False]
    batch = dataset.samples(times=(0., .5), chunk=10)[[0]]
    with h5py.File(folder/"KITCHEN_SCENE1_open_the_drawer_demo.hdf5") as file:
        demo = file["data/demo_0"]
        stored = demo["obs/agentview_rgb"][10]
        np.testing.assert_array_equal(batch.video[0, 0, 1].numpy(), stored[::-1].transpose(2, 0, 1)) # rows reversed, columns not
        np.testing.assert_allclose(batch.action[0].numpy(), demo["actions"][:10], atol=1e-6)
        np.testing.assert_allclose(batch.proprio[0].numpy(), np.concatenate([demo["obs/ee_states"][0], demo["obs/gripper_states"][0]]), atol=1e-6)
    assert batch.video[0, 0, 0, :, :8].float().mean() > batch.video[0, 0, 0, :, 8:].float().mean() # the sky is above


@pytest.mark.parametrize("convention", ["opencv", ""])
def test_images_that_are_upright_stay_so(tmp_path, convention):
    write_task(tmp_path/"a.hdf5", convention=convention)
    image = open_hdf5(tmp_path).read_images(0, [3], "agentview_rgb")[0]
    assert image[0, 0, 0] == 3


def test_choices(folder):
    source = open_hdf5(folder, Reading(cameras=("eye_in_hand_rgb",), columns=("x", "gripper"), episodes="not STUDY_SCENE1_pick_up_the_book_demo/demo_0", hz=10))
    assert source.views == ("eye_in_hand_rgb",) and source.labels == ("x", "gripper") and source.hz == 10 and len(source.lengths) == 11
    assert source.vectors(0)[0].shape == (30, 2) and source.relative.tolist() == [True, False]
    with pytest.raises(ValueError, match="no 'lift'"): open_hdf5(folder, Reading(columns=("lift",)))
    with pytest.raises(ValueError, match="no camera 'top'"): open_hdf5(folder, Reading(cameras=("top",)))


def first_row(source): return source.read_images(0, [1], "agentview_rgb")[0].sum()


def test_other_processes_open_their_own_files(folder):
    source = open_hdf5(folder)
    here = first_row(source) # now a file is open
    assert first_row(pickle.loads(pickle.dumps(source))) == here
    with ProcessPoolExecutor(1) as pool: assert pool.submit(first_row, source).result(60) == here


def change(path, f):
    with h5py.File(path, "r+") as file: f(file["data"])


@pytest.mark.parametrize("damage,message", [
    (lambda d: d["demo_0"].__delitem__("actions"), "has no actions"), (lambda d: d.__delitem__("demo_1"), "num_demos says 2"),
    (lambda d: d.attrs.__setitem__("problem_info", "{"), "problem_info of data is not JSON"),
    (lambda d: d.attrs.__delitem__("problem_info"), "no language_instruction"),
    (lambda d: (d["demo_1/obs"].__delitem__("agentview_rgb"), d["demo_1/obs"].__setitem__("agentview_rgb", np.zeros((9, 16, 16, 3), np.uint8))), "has 9 rows, its actions 25"),
], ids=["actions", "demos", "json", "text", "rows"])
def test_what_is_missing_is_named(tmp_path, damage, message):
    write_task(path := tmp_path/"task_demo.hdf5")
    change(path, damage)
    with pytest.raises(ValueError, match=message) as error: HDF5Folder(tmp_path)
    assert "task_demo.hdf5" in str(error.value)


def test_damaged_files_are_refused_or_read(folder, capsys):
    "Cut, or with bytes changed at random: a `ValueError` that names the file, or samples."
    path, rng = folder/"STUDY_SCENE1_pick_up_the_book_demo.hdf5", np.random.default_rng(0)
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole)//2])
    source = open_hdf5(folder) # a run leaves the file out
    assert len(source.lengths) == 11 and "restore a whole copy" in capsys.readouterr().out
    for _ in range(40):
        data = np.frombuffer(whole, np.uint8).copy()
        data[rng.integers(0, 6000, 20)] = rng.integers(0, 256, 20)
        path.write_bytes(data.tobytes())
        try:
            source = HDF5Folder(folder, Reading(episodes="STUDY_SCENE1_pick_up_the_book_demo/demo_0"))
            source.samples(chunk=10)[[0]]
        except ValueError as error: assert str(folder) in str(error) or "episodes is" in str(error), error


def test_doctor_and_export(folder, tmp_path):
    report = examine(folder)
    assert report.format == "hdf5" and not [f for f in report.findings if f.severity == "error"], report
    (folder/"cut_demo.hdf5").write_bytes(b"\x89HDF\r\n")
    assert any("cut_demo.hdf5" in str(f) for f in examine(folder).findings)
    (folder/"cut_demo.hdf5").unlink()
    some = open_hdf5(folder, Reading(episodes="STUDY_SCENE1_pick_up_the_book_demo/demo_0"))
    written = open_lerobot(write_lerobot(tmp_path/"lerobot", some, 10, None))
    assert written.lengths.tolist() == [21] and written.texts == ["pick up the book"]
    np.testing.assert_allclose(written.vectors(0)[0], some.vectors(0)[0], atol=1e-6)


def test_frozen_encoders_learn_from_it_and_are_played(tmp_path):
    "`eval_frozen` on files of LIBERO's layout, before the stand-in for its simulator."
    (tmp_path/"libero_90").mkdir()
    write_task(tmp_path/"libero_90/open_drawer_demo.hdf5", lengths=(20,)*3)
    given = ["-p", "benchmark", "stand-in", "-p", "split", tmp_path/"libero_90", "-p", "test_tasks", "open_drawer", "-p", "probes", "{'steps': 4, 'project': 4, 'hidden': 4}"]
    done = defi_nb("run", "eval_frozen", "--out", tmp_path/"out", *given, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    encoders = json.loads((tmp_path/"out/metrics.json").read_text())["encoders"]
    assert {name: e["rollouts"] for name, e in encoders.items()} == {"raw pixels": 1, "DINOv2": 1}
    assert "frozen DINOv2" in (tmp_path/"out/played/DINOv2-open_drawer/result.json").read_text()
