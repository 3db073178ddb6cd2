"Data as other people's cameras, spreadsheets, file systems and crashed recordings leave it: the right samples, or one line that names the file and a remedy."
import csv
import json
import re
import shutil
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pytest
from PIL import Image

from defi_nb.core.video import fake_video, read_numbers, write_video
from defi_nb.data.csv_folder import write_own
from defi_nb.data.episodes import PLAIN
from defi_nb.data.load import open_piece, read_where

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

N, TEXTS = 12, ("open the drawer", "push the block", "lift the cup", "turn on the light")


def actions(e): # (N,2) of an episode, told apart by its first number
    return np.stack([100*e + np.arange(N), np.sin(np.arange(N))], 1)


def video(e): return fake_video(N, start=60*e) # its frames carry their numbers


def own(folder):
    episodes = ({"name": f"größe{e}", "text": TEXTS[e], "video": {"front": video(e)}, "action": actions(e)} for e in range(4))
    return write_own(folder, episodes, ("x", "y"), 10)


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
    from io import BytesIO
    Image.fromarray(x).save(file := BytesIO(), "png")
    return file.getvalue()


def write_lines(path, rows): path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")


def opened(folder, reading=PLAIN):
    "What a run reads: text -> number of the first frame and, where there are actions, the first of an episode's or clip's."
    (asked,) = read_where(str(folder))
    piece = open_piece(asked, 32, reading)
    found = {}
    if piece.format == "videos":
        for clip in piece.units:
            batch = piece.samples((0., .3), units=[clip], size=64)[0]
            found.setdefault(batch.text[0], []).append((int(read_numbers(batch.video[0, 0])[0]), None))
        return found
    source = piece.data
    for e in range(len(source.lengths)):
        with source.reading(e):
            action, frame = source.vectors(e)[0], source.pictures(e, [0], piece.views[0])[0]
            found.setdefault(source.instructions(e, [0])[0], []).append((int(read_numbers(frame)), None if action is None else float(action[0, 0])))
    return found


def expected(kind, without=()): return {TEXTS[e]: [(60*e, None if kind == "videos" else 100.*e)] for e in range(4) if e not in without}


MAKE = dict(own=own, videos=clips, lerobot=lerobot)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    return {kind: make(root/kind) for kind, make in MAKE.items()}


def one_line(error): # that names a file or folder and what to do
    text = str(error).split("\n")[0]
    assert isinstance(error, (ValueError, FileNotFoundError)), repr(error)
    assert re.search(r"[/\\]", text) and re.search(r": |; ", text), text
    assert "download it again" not in text, text
    return text


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
