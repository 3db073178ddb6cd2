"Data as other people's cameras, spreadsheets, file systems and crashed recordings leave it: the right samples, or one line that names the file and a remedy."
import csv
import json
import os
import re
import shutil
from collections import OrderedDict, defaultdict
from io import BytesIO
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pytest
from PIL import Image

from defi_nb.core.video import fake_video, read_numbers, write_video
from defi_nb.data.csv_folder import write_csv_folder
from defi_nb.data.episodes import PLAIN, ImageTable, Reading, Window
from defi_nb.data.lerobot import open_lerobot
from defi_nb.data.load import open_dataset, parse_data_spec
from defi_nb.data.record import finish_split, write_segment
from defi_nb.data.robot_dataset import measure_scale
from defi_nb.doctor.examine import examine

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

N, TEXTS = 12, ("open the drawer", "push the block", "lift the cup", "turn on the light")


def actions(e): # (N,2) of an episode, told apart by its first number
    return np.stack([100*e + np.arange(N), np.sin(np.arange(N))], 1)


def video(e): return fake_video(N, start=60*e) # its frames carry their numbers


def own(folder):
    episodes = ({"name": f"größe{e}", "text": TEXTS[e], "video": {"front": video(e)}, "action": actions(e)} for e in range(4))
    return write_csv_folder(folder, episodes, ("x", "y"), 10)


def clips(folder):
    for e in range(4): write_video(folder/f"lab{e % 2}/öffne{e}.mp4", video(e), g=4)
    rows = [("file_name", "text"), *((f"lab{e % 2}/öffne{e}.mp4", TEXTS[e]) for e in range(4))]
    with open(folder/"captions.csv", "w", newline="", encoding="utf-8") as file: csv.writer(file).writerows(rows)
    return folder


def lerobot(folder, action="action", state="observation.state", image="observation.images.top"):
    "LeRobotDataset v2.1 with its images as PNG in the tables."
    features = {image: dict(dtype="image", shape=[32, 32, 3]), "timestamp": dict(dtype="float32", shape=[1])}
    features |= {k: dict(dtype="float32", shape=[2], names=None) for k in (action, state) if k}
    (folder/"meta").mkdir(parents=True)
    for e in range(4):
        path = folder/f"data/chunk-000/episode_{e:06d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        columns = {k: list(actions(e).astype(np.float32)) for k in (action, state) if k} | {image: [dict(bytes=png(x), path=None) for x in fake_video(N, 32, 60*e)]}
        columns |= dict(timestamp=np.arange(N, dtype=np.float32)/10, frame_index=np.arange(N), episode_index=np.full(N, e), task_index=np.full(N, e))
        pq.write_table(pa.table(columns), path)
    info = dict(codebase_version="v2.1", fps=10, total_episodes=4, total_tasks=4, chunks_size=1000, features=features, video_path=None,
                data_path="data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet")
    (folder/"meta/info.json").write_text(json.dumps(info))
    write_lines(folder/"meta/episodes.jsonl", [dict(episode_index=e, length=N, tasks=[TEXTS[e]]) for e in range(4)])
    write_lines(folder/"meta/tasks.jsonl", [dict(task_index=e, task=TEXTS[e]) for e in range(4)])
    return folder


def png(x):
    Image.fromarray(x).save(file := BytesIO(), "png")
    return file.getvalue()


def write_lines(path, rows): path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")


def opened(folder, reading=PLAIN):
    "What a run reads: text -> number of the first frame and, where there are actions, the first of an episode's or clip's."
    (asked,) = parse_data_spec(str(folder))
    piece = open_dataset(asked, 32, reading)
    found = {}
    if piece.format == "videos":
        for clip in piece.units:
            batch = piece.samples((0., .3), units=[clip], size=64)[0]
            found.setdefault(batch.text[0], []).append((int(read_numbers(batch.video[0, 0])[0]), None))
        return found
    source = piece.data
    for e in range(len(source.lengths)):
        with source.reading(e):
            action, frame = source.vectors(e)[0], source.read_images(e, [0], piece.views[0])[0]
            found.setdefault(source.instructions(e, [0])[0], []).append((int(read_numbers(frame)), None if action is None else float(action[0, 0])))
    return found


def expected(kind, without=()): return {TEXTS[e]: [(60*e, None if kind == "videos" else 100.*e)] for e in range(4) if e not in without}


MAKE = dict(own=own, videos=clips, lerobot=lerobot)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    return {kind: make(root/kind) for kind, make in MAKE.items()}


# Mutations of a sound set: each returns the episodes that it costs; None: it may also be refused.


def _some(rng, paths): return paths[rng.integers(len(paths))]


def _files(folder, *suffixes): return sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix.lower() in suffixes and not any(part.startswith(".") for part in p.relative_to(folder).parts))


def _number(path): return int(re.findall(r"\d+", path.stem)[-1])


def capitals(folder, kind, rng):
    for p in _files(folder, ".mp4", ".csv"):
        if rng.random() < .5 and p.stem != "captions": p.rename(p.with_suffix(p.suffix.upper()))
    return ()


def decompose(folder, kind, rng):
    for p in _files(folder, ".mp4", ".csv"):
        if rng.random() < .5: p.rename(p.with_name(normalize("NFD", p.name)))
    return ()


def hidden(folder, kind, rng):
    for p in _files(folder, ".mp4", ".csv", ".jsonl", ".parquet"):
        if rng.random() < .3: p.with_name("._" + p.name).write_bytes(b"\0\5\x16\7" + bytes(60))
    (folder/".trash").mkdir(exist_ok=True)
    for p in _files(folder, ".mp4")[:1]: shutil.copy(p, folder/".trash"/p.name)
    return ()


def linked(folder, kind, rng):
    for p in [p for p in sorted(folder.iterdir()) if p.is_dir() and not p.is_symlink() and not p.name.startswith(".")]:
        away = folder.parent/f"{folder.name}-disk"/p.name
        away.parent.mkdir(exist_ok=True)
        p.rename(away)
        p.symlink_to(away, target_is_directory=True)
        if rng.random() < .3 and kind == "videos": (away/"up").symlink_to(folder, target_is_directory=True)
    return ()


def encoding(folder, kind, rng):
    name = _some(rng, ["utf-8-sig", "utf-16", "cp1252"])
    for p in _files(folder, ".csv", ".jsonl")[:rng.integers(1, 4)]:
        text = p.read_text(encoding="utf-8")
        p.write_bytes(text.encode(name, "replace"))
    return None if name == "cp1252" else ()


def separator(folder, kind, rng):
    mark = _some(rng, [";", "\t"])
    for p in _files(folder, ".csv"):
        if rng.random() < .6:
            with open(p, newline="", encoding="utf-8") as file: rows = list(csv.reader(file))
            if mark == ";" and p.stem != "captions": rows = [[c.replace(".", ",") for c in row] for row in rows]
            with open(p, "w", newline="", encoding="utf-8") as file: csv.writer(file, delimiter=mark).writerows(rows)
    return ()


def line_ends(folder, kind, rng):
    for p in _files(folder, ".csv", ".jsonl"): p.write_bytes(p.read_bytes().replace(b"\n", b"\r\n" if b"\r\n" not in p.read_bytes() else b"\n"))
    return ()


def spelt(folder, kind, rng):
    "Names in the table of captions as another machine wrote them."
    path = folder/"captions.csv"
    if not path.exists(): return ()
    with open(path, newline="", encoding="utf-8") as file: head, *rows = csv.reader(file)
    change = _some(rng, [lambda n: n.upper(), lambda n: n.replace("/", "\\"), lambda n: n.removesuffix(".mp4"), lambda n: f"./{n}", lambda n: f"/old/disk/{n}", lambda n: normalize("NFD", n)])
    with open(path, "w", newline="", encoding="utf-8") as file: csv.writer(file).writerows([head, *([change(n), t] for n, t in rows)])
    return ()


def cut(folder, kind, rng):
    p = _some(rng, _files(folder, ".mp4", ".parquet"))
    p.write_bytes(p.read_bytes()[:rng.integers(0, p.stat().st_size*2//3)])
    return (_number(p),)


def gone(folder, kind, rng):
    p = _some(rng, _files(folder, ".mp4", ".parquet"))
    p.unlink()
    return (_number(p),)


def half_a_table(folder, kind, rng):
    tables = _files(folder/"actions", ".csv") or _files(folder, ".jsonl")
    if kind == "videos": return ()
    p = _some(rng, tables)
    p.write_bytes(p.read_bytes()[:-rng.integers(3, 12)])
    return None if kind == "own" or p.stem == "tasks" else (3,) # a number may have lost its last digits


def counted(folder, kind, rng):
    if kind != "lerobot": return ()
    info = json.loads((folder/"meta/info.json").read_text())
    (folder/"meta/info.json").write_text(json.dumps(info | dict(total_episodes=int(rng.integers(3, 6)))))
    return ()


def columns(folder, kind, rng):
    "Other names of the columns that are not actions."
    if kind == "own":
        name = _some(rng, ["Timestamp", "time", "T", "time_s", "Time (s)", "seconds"])
        for p in _files(folder/"actions", ".csv"): p.write_text(re.sub("^timestamp", name, p.read_text()))
    elif kind == "videos": (folder/"captions.csv").write_text((folder/"captions.csv").read_text().replace("file_name,text", _some(rng, ["File,Text", "video,caption", "PATH,Instruction"])))
    else:
        names = {"action": _some(rng, ["actions", "Action", "actions.joint"]), "observation.state": _some(rng, ["state", "observation.states"]), "observation.images.top": _some(rng, ["image", "observation/image"])}
        path = folder/"meta/info.json"
        info = json.loads(path.read_text())
        path.write_text(json.dumps(info | dict(features={names.get(k, k): f for k, f in info["features"].items()})))
        for p in _files(folder/"data", ".parquet"):
            table = pq.read_table(p)
            pq.write_table(table.rename_columns([names.get(c, c) for c in table.column_names]), p)
    return ()


def sound(folder, **kw): # to the doctor, which looks by the same eye
    report = examine(folder, seconds=3, reading=Reading(**kw))
    return report.sound


@pytest.mark.parametrize("names", [("actions", "state", "image"), ("Action", "observation/state", "observation/image"), ("robot_action", "proprio", "observation.images.cam_high.rgb"), ("action_ee", "states", "wrist_image")])
def test_lerobot_keys_of_other_names(tmp_path, names):
    folder = lerobot(tmp_path/"set", *names)
    assert opened(folder) == expected("lerobot") and sound(folder)
    source = open_lerobot(folder)
    assert (source.action, source.proprio, source.view_keys[source.views[0]]) == names
    assert (source.vectors(2)[1] == source.vectors(2)[0]).all()


def test_lerobot_sets_without_actions_and_with_several(tmp_path):
    film = lerobot(tmp_path/"film", action=None, state=None)
    assert opened(film) == {t: [(n, None)] for t, ((n, _),) in expected("lerobot").items()} and sound(film)
    two = lerobot(tmp_path/"two", action="action.joints", state="action.pose")
    assert opened(two) == {t: [(n, None)] for t, ((n, _),) in expected("lerobot").items()} and sound(two)
    with pytest.raises(ValueError, match="has several keys of actions, action.joints, action.pose: give `action` of reading one of them"): measure_scale(open_lerobot(two))
    assert opened(two, Reading(action="action.pose")) == expected("lerobot")


def change(folder, column, of): # of each table of actions
    for path in _files(folder/"data", ".parquet"):
        table = pq.read_table(path)
        pq.write_table(table.set_column(table.schema.get_field_index(column), column, of(table[column])), path)


def other_modes(column): # PNG as other programs write them
    modes = "RGB", "RGBA", "P"
    def saved(data, mode):
        Image.open(BytesIO(data)).convert(mode).save(file := BytesIO(), "png")
        return file.getvalue()
    return pa.array([dict(bytes=saved(v["bytes"], modes[i % 3]), path=None) for i, v in enumerate(column.to_pylist())])


ODD = {"gaps": (lambda f: [p.unlink() for p in f.rglob("episode_000001.parquet")] + [rewrite_lines(f/"meta/episodes.jsonl", lambda rows: [r for r in rows if r["episode_index"] != 1])], {1}),
       "float64": (lambda f: change(f, "action", lambda c: pa.array([np.float64(v) for v in c.to_pylist()])), ()),
       "int32": (lambda f: change(f, "action", lambda c: pa.array([np.int32(v) for v in c.to_pylist()])), ()),
       "fixed size": (lambda f: change(f, "action", lambda c: pa.array(c.to_pylist(), pa.list_(pa.float32(), 2))), ()),
       "modes": (lambda f: change(f, "observation.images.top", other_modes), ()),
       "null tasks": (lambda f: rewrite_lines(f/"meta/episodes.jsonl", lambda rows: [r | dict(tasks=[None] if r["episode_index"] == 2 else r["tasks"]) for r in rows]), {2}),
       "no tasks": (lambda f: rewrite_lines(f/"meta/episodes.jsonl", lambda rows: [r | dict(tasks=None if r["episode_index"] == 3 else r["tasks"]) for r in rows]), {3})}


def rewrite_lines(path, of): write_lines(path, of([json.loads(line) for line in path.read_text().splitlines()]))


@pytest.mark.parametrize("name", ODD)
def test_lerobot_of_odd_contents(sets, tmp_path, name):
    edit, lost = ODD[name]
    edit(folder := Path(shutil.copytree(sets["lerobot"], tmp_path/"set")))
    assert opened(folder) == expected("lerobot", lost)


def test_lerobot_in_several_chunks(sets, tmp_path):
    folder = Path(shutil.copytree(sets["lerobot"], tmp_path/"set"))
    info = json.loads((folder/"meta/info.json").read_text())
    (folder/"meta/info.json").write_text(json.dumps(info | dict(chunks_size=2)))
    for e in (2, 3):
        (folder/"data/chunk-001").mkdir(exist_ok=True)
        (folder/f"data/chunk-000/episode_{e:06d}.parquet").rename(folder/f"data/chunk-001/episode_{e:06d}.parquet")
    assert opened(folder) == expected("lerobot") and sound(folder)


@pytest.mark.parametrize("times", [lambda c: np.asarray(c) + 1.7e9, lambda c: np.asarray(c)[::-1].copy(), lambda c: np.asarray(c)*2, lambda c: np.full(len(c), np.nan)])
def test_lerobot_times_that_are_not_its_rate(sets, tmp_path, times):
    folder = Path(shutil.copytree(sets["lerobot"], tmp_path/"set"))
    change(folder, "timestamp", lambda c: pa.array(times(c)))
    with pytest.raises(ValueError, match=r"episode_00000\d.parquet: row \d+ of episode \d has time .*correct fps in meta/info.json"): opened(folder)
    assert not sound(folder)


def later(path): os.utime(path, (path.stat().st_atime, path.stat().st_mtime + 1)) # as if written anew, with the same size


@pytest.mark.parametrize("kind", MAKE)
def test_a_replaced_file_makes_other_data(sets, tmp_path, kind):
    "For encodings that are kept, and for a training that is to be gone on with: any file of all, of equal size, and a caption."
    digests = []
    for i, edit in enumerate([lambda f: None, lambda f: None, lambda f: later(_files(f, ".mp4", ".parquet")[2]), lambda f: later(_files(f, ".mp4", ".parquet")[0]),
                              lambda f: [p.write_text(p.read_text(encoding="utf-8").replace("lift the cup", "take the cup"), encoding="utf-8") for p in _files(f, ".csv", ".jsonl")]]):
        folder = Path(shutil.copytree(sets[kind], tmp_path/str(i)/"set")) # with the files' times
        edit(folder)
        data = open_dataset(parse_data_spec(str(folder))[0], 32).data
        digests.append((data.digest(), json.dumps(ImageTable([data.samples((0.,), size=32)]).identity()).replace(str(folder), "")))
    for mine in (d[0] for d in digests[1:]): assert (mine == digests[0][0]) == (mine == digests[1][0])
    assert len({d[0] for d in digests}) == 4 and digests[0][0] == digests[1][0]
    assert len({d[1] for d in digests[1:4]}) == 3


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0c", "\x1e"])
def test_a_line_ends_at_its_end_only(sets, tmp_path, mark):
    text = f"open the drawer{mark}then close it"
    for kind in MAKE:
        folder = Path(shutil.copytree(sets[kind], tmp_path/kind))
        for p in (*folder.glob("captions.csv"), *folder.rglob("*.jsonl")): p.write_text(p.read_text(encoding="utf-8").replace(TEXTS[0], text), encoding="utf-8", newline="")
        assert text in opened(folder) and len(opened(folder)) == 4


def test_text_of_other_encodings_is_read_or_refused_by_name(sets, tmp_path):
    for kind, name in (("own", "captions.csv"), ("videos", "captions.csv"), ("lerobot", "meta/tasks.jsonl")):
        folder = Path(shutil.copytree(sets[kind], tmp_path/kind))
        text = (folder/name).read_text(encoding="utf-8").replace(TEXTS[0], "öffne die Schublade")
        for encoding in ("utf-8-sig", "utf-16"):
            (folder/name).write_bytes(text.encode(encoding))
            assert "öffne die Schublade" in opened(folder)
        (folder/name).write_bytes(text.encode("cp1252", "replace"))
        with pytest.raises(ValueError, match=f"{name}, line . is not in UTF-8 .*: save it as UTF-8"): opened(folder)
        assert not sound(folder)


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("damage", ["cut", "gone", "empty", "zeros"])
def test_damage_costs_the_episodes_that_have_it(sets, tmp_path, capsys, kind, damage):
    folder = Path(shutil.copytree(sets[kind], tmp_path/"set"))
    for path in _files(folder, ".mp4", ".parquet")[1:3]:
        data = path.read_bytes()
        if damage == "gone": path.unlink()
        else: path.write_bytes(dict(cut=data[:len(data)//2], empty=b"", zeros=data[:100] + bytes(len(data) - 100))[damage])
    lost = {1, 2}
    if kind == "videos": lost = {_number(p) for p in _files(sets[kind], ".mp4")[1:3]}
    assert opened(folder) == expected(kind, lost)
    said = capsys.readouterr().out
    assert ("2 skipped, such as" in said) and ("2 episodes" in said or "2 clips" in said)
    assert not sound(folder)
    names = dict(own="not größe1, größe2", lerobot="not 1,2", videos="")[kind]
    if names: assert sound(folder, episodes=names) and opened(folder, Reading(episodes=names)) == expected(kind, lost)


def test_a_recording_that_crashed(sets, tmp_path, capsys):
    more, less, line = (Path(shutil.copytree(sets["lerobot"], tmp_path/n)) for n in ("more", "less", "line"))
    for folder, n in ((more, 3), (less, 5)):
        info = json.loads((folder/"meta/info.json").read_text())
        (folder/"meta/info.json").write_text(json.dumps(info | dict(total_episodes=n)))
        assert opened(folder) == expected("lerobot")
    assert sound(more) and not sound(less) and "lists 4 episodes, info.json says 5" in capsys.readouterr().out
    path = line/"meta/episodes.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    assert opened(line) == expected("lerobot", {3}) and not sound(line)


@pytest.mark.parametrize("kind", MAKE)
def test_links_are_followed_once(sets, tmp_path, kind):
    folder = Path(shutil.copytree(sets[kind], tmp_path/"set"))
    linked(folder, kind, np.random.default_rng(0))
    for p in [p for p in folder.iterdir() if p.is_symlink()][:1]: (p.resolve()/"loop").symlink_to(folder, target_is_directory=True)
    assert opened(folder) == expected(kind) and sound(folder)
    (tmp_path/"all").symlink_to(folder, target_is_directory=True)
    assert opened(tmp_path/"all") == expected(kind)
    files = tmp_path/"cache" # each file a link, as in a hub's cache
    for p in (p for p in sets[kind].rglob("*") if p.is_file()):
        (files/p.relative_to(sets[kind])).parent.mkdir(parents=True, exist_ok=True)
        (files/p.relative_to(sets[kind])).symlink_to(p)
    assert opened(files) == expected(kind) and sound(files)


@pytest.mark.parametrize("change", [capitals, decompose, hidden])
def test_names_of_other_machines(sets, tmp_path, change):
    for kind in ("own", "videos"):
        for seed in range(3):
            folder = Path(shutil.copytree(sets[kind], tmp_path/f"{kind}{seed}"))
            change(folder, kind, np.random.default_rng(seed))
            assert opened(folder) == expected(kind) and sound(folder)


def test_captions_that_fit_no_video_say_why(sets, tmp_path):
    folder = Path(shutil.copytree(sets["videos"], tmp_path/"set"))
    (folder/"captions.csv").write_text("file_name,text\nclip_one.mp4,open it\n")
    with pytest.raises(ValueError, match="captions.csv names none of the 4 videos: 'clip_one.mp4' is not there, 'lab0.*' is; write the files' names in file_name"): opened(folder)


@pytest.mark.parametrize("name", ["pick, place", "take*2", "a,b,c*0.5", "set [v2]", "own:x", "#1 'a' \"b\"", "50% done", "~lab", "run 12:30"])
def test_names_of_folders(sets, tmp_path, name):
    folder = Path(shutil.copytree(sets["own"], tmp_path/name))
    assert opened(folder) == expected("own")
    both = parse_data_spec(f"{folder}*0.5, {sets['videos']}*0.5")
    assert [(a.folder, a.weight) for a in both] == [(folder, .5), (sets["videos"], .5)]
    with pytest.raises(ValueError, match="a comma stands between several, an asterisk before a weight"): open_dataset(parse_data_spec(f"{tmp_path}/not, there")[0], 32)


def one_line(error): # that names a file or folder and what to do
    text = str(error).split("\n")[0]
    assert isinstance(error, (ValueError, FileNotFoundError)), repr(error)
    assert re.search(r"[/\\]", text) and re.search(r": |; ", text), text
    assert "download it again" not in text, text
    return text


WHOLE = capitals, decompose, hidden, encoding, separator, line_ends, spelt, columns, counted # first, as they leave all episodes
DAMAGE = cut, gone, half_a_table
FAST = dict(own=.3, videos=.3, lerobot=.4) # kind -> how often


def mutate(sets, tmp, seed):
    "A set after one to three changes: its folder, its kind, what was changed, the episodes that this costs (None: or a refusal)."
    rng = np.random.default_rng(seed)
    kind = rng.choice(list(FAST), p=list(FAST.values()))
    folder = Path(shutil.copytree(sets[kind], tmp/f"{seed}-{_some(rng, ['set', 'a, b', 'take*2', 'Würfel', '50% [x]'])}"))
    chosen = [WHOLE[i] for i in rng.permutation(len(WHOLE))[:rng.integers(0, 3)]]
    if encoding in chosen: chosen = [f for f in chosen if f not in (separator, spelt, columns, line_ends)] # which read UTF-8
    if spelt in chosen: chosen = [f for f in chosen if f not in (separator, columns)]
    if {separator, columns} <= {*chosen}: chosen.remove(separator)
    if rng.random() < .6: chosen.append(_some(rng, DAMAGE))
    if rng.random() < .3: chosen.append(linked)
    lost = set()
    for change in chosen:
        cost = change(folder, kind, rng)
        lost = None if cost is None or lost is None else lost | set(cost)
    return folder, kind, [f.__name__ for f in chosen], lost


def check(sets, tmp, seed):
    folder, kind, chosen, lost = mutate(sets, tmp, seed)
    try: found = opened(folder)
    except Exception as error: # what it may be, `one_line` says
        text = one_line(error)
        assert lost is None, f"{seed} {kind} {chosen}: {text}"
    else:
        everything = expected(kind)
        assert set(found) <= set(everything) and all(found[t] == everything[t] for t in found), f"{seed} {kind} {chosen}: {found}"
        if lost is not None: assert found == expected(kind, lost), f"{seed} {kind} {chosen}: lost {set(everything) - set(found)}, not {lost}"
    finally:
        shutil.rmtree(folder)
        shutil.rmtree(folder.parent/f"{folder.name}-disk", ignore_errors=True)


def test_mutated_sets_give_the_right_samples_or_one_line(sets, tmp_path):
    for seed in range(500): check(sets, tmp_path, seed)


@pytest.mark.slow
def test_ten_thousand_mutated_sets(sets, tmp_path):
    for seed in range(1000, 11_000): check(sets, tmp_path, seed)


def calvin(folder):
    "A small recording in CALVIN's format: two windows in each split."
    rng = np.random.default_rng(0)
    for split, start in (("training", 0), ("validation", 500)):
        frames = dict(rel_actions=rng.uniform(-1, 1, (60, 7)), robot_obs=rng.normal(size=(60, 15))*.01, scene_obs=rng.normal(size=(60, 24))*.01)
        frames |= dict(rgb_static=fake_video(60, 24), rgb_gripper=fake_video(60, 24, 60))
        write_segment(folder/split, start, frames, "D", [Window(0, 29, "open_drawer", "open the drawer"), Window(30, 59, "turn_on_led", "turn on the light")])
        finish_split(folder/split)
    return folder


def windows(folder, reading=PLAIN):
    piece = open_dataset(parse_data_spec(str(folder))[0], 24, reading)
    return {w.text: read_numbers(piece.samples((0.,), units=[w], stride=1.)[0].video[0, 0]).tolist() for w in piece.units}


WINDOWS = {"open the drawer": [0], "turn on the light": [30]}


def rewrite(folder, change):
    path = folder/"training/lang_annotations/auto_lang_ann.npy"
    np.save(path, change(np.load(path, allow_pickle=True).item()), allow_pickle=True)


@pytest.mark.parametrize("change", [
    lambda d: OrderedDict(language=OrderedDict(d["language"]), info=OrderedDict(d["info"])), lambda d: defaultdict(dict, d),
    lambda d: defaultdict(list, language=defaultdict(str, d["language"]), info=OrderedDict(d["info"])),
    lambda d: d | dict(language=d["language"] | dict(ann=np.array(d["language"]["ann"]), task=np.array(d["language"]["task"], object)))])
def test_annotations_of_other_writers(tmp_path, change):
    folder = calvin(tmp_path/"set")
    rewrite(folder, change)
    assert windows(folder) == WINDOWS and sound(folder)


def test_annotations_in_other_folders(tmp_path):
    folder = calvin(tmp_path/"set")
    first, other = (folder/"training"/n for n in ("lang_annotations", "lang_paraphrase-MiniLM-L3-v2"))
    first.rename(other)
    assert windows(folder) == WINDOWS and sound(folder)
    shutil.copytree(other, folder/"training/lang_clip_resnet50") # the same sentences
    assert windows(folder) == WINDOWS and sound(folder)
    shutil.copytree(other, first)
    rewrite(folder, lambda d: d | dict(language=d["language"] | dict(ann=["draw", "light"])))
    first.rename(folder/"training/lang_other")
    with pytest.raises(ValueError, match="has other instructions in each of lang_clip_resnet50, lang_other, lang_paraphrase-MiniLM-L3-v2: give `annotations` of reading"): windows(folder)
    assert not sound(folder) and sound(folder, annotations="lang_other")
    assert [*windows(folder, Reading(annotations="lang_other"))] == ["draw", "light"]


def test_missing_frames_cost_their_windows(tmp_path, capsys):
    folder = calvin(tmp_path/"set")
    (folder/"training/episode_0000040.npz").unlink()
    assert windows(folder) == {"open the drawer": [0]} and not sound(folder)
    assert "1 of 60 frames are missing, such as episode_0000040.npz; 1 of 2 windows are left out" in capsys.readouterr().out
    (folder/"training/episode_0000003.npz").write_bytes(b"")
    with pytest.raises(ValueError, match="episode_0000003.npz is damaged .*; or move the file away, and a run leaves its windows out"): open_dataset(parse_data_spec(str(folder))[0], 24).data.video["static"][3]
    (folder/"training/episode_0000003.npz").unlink()
    with pytest.raises(ValueError, match="has no windows"): windows(folder)
