"Checkpoint files by strangers: nothing in them is executed, none makes the reader hang, and each failure is one line."
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import warnings
import zipfile
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from conftest import ENV, ROOT
from safetensors.torch import load_file, save_file

from defi_nb.models.action_adapter import AdapterConfig
from defi_nb.models.gidm import GIDM, GIDMConfig
from defi_nb.weights.official import (
    OURS, export_gidm, export_policy, load_gidm, load_policy, official_name)
from defi_nb.models.policy import CoupledPolicy, PolicyConfig
from defi_nb.core.safe_load import read_tensors
from defi_nb.core.spec import DataSpec

# ---- pickles by hand ----

def text(s): return b"X" + struct.pack("<I", len(s.encode())) + s.encode()
def name(module, attribute): return f"c{module}\n{attribute}\n".encode()
def call(function, *args): return function + b"(" + b"".join(args) + b"tR"
def integer(n): return pickle.dumps(n, 2)[2:-1]
def ints(*values): return b"(" + b"".join(map(integer, values)) + b"t"
def storage(key="0", kind="FloatStorage", count=4): return b"(" + text("storage") + name("torch", kind) + text(key) + text("cpu") + integer(count) + b"tQ"
def tensor(of=None, offset=0, size=(4,), stride=(1,)):
    return call(name("torch._utils", "_rebuild_tensor_v2"), of or storage(), integer(offset), ints(*size), ints(*stride), b"\x89", call(name("collections", "OrderedDict")))
def state(**values): return b"\x80\x02}(" + b"".join(text(k) + v for k, v in values.items()) + b"u."


def archive(path, code, method=zipfile.ZIP_STORED, **more):
    "A torch archive with a given pickle and one storage of four floats."
    entries = {"data.pkl": code, "byteorder": b"little", "version": b"3\n", "data/0": struct.pack("<4f", 1, 2, 3, 4)} | more
    with zipfile.ZipFile(path, "w", method) as z:
        for entry, content in entries.items():
            info = zipfile.ZipInfo(f"a/{entry}")
            pad = -(z.fp.tell() + 34 + len(info.filename)) % 64 # storages lie at multiples of 64 bytes, as torch has them
            info.compress_type, info.extra = method, struct.pack("<2sH", b"FB", pad) + bytes(pad)
            z.writestr(info, content)


def gadgets(marker):
    "Pickles (one object each) that would make a file, if anything of them ran."
    touch, expression = f"touch {marker}", f"open({str(marker)!r}, 'w')"
    system = name("os", "system")
    made = {
        "system": call(system, text(touch)), "posix": call(name("posix", "system"), text(touch)), "nt": call(name("nt", "system"), text(touch)),
        "eval": call(name("builtins", "eval"), text(expression)), "exec": call(name("__builtin__", "exec"), text(expression)),
        "import": call(name("builtins", "__import__"), text("antigravity")), "getattr": call(name("builtins", "getattr"), system, text("x")),
        "popen": call(name("subprocess", "Popen"), b"(" + text("touch") + text(str(marker)) + b"t"),
        "partial": call(name("functools", "partial"), system, text(touch)), "reduce": call(name("functools", "reduce"), system, b"(" + text(touch) + b"t"),
        "methodcaller": call(name("operator", "methodcaller"), text("system")), "attrgetter": call(name("operator", "attrgetter"), text("system")),
        "map": call(name("builtins", "map"), system, b"(" + text(touch) + b"t"), "codecs": call(name("codecs", "decode"), text(touch), text("rot13")),
        "loads": call(name("pickle", "loads"), b"B" + struct.pack("<I", 9) + b"cos\nx\n(tR"), "torch_load": call(name("torch", "load"), text("x.pt")),
        "hub": call(name("torch.hub", "load"), text("a/b"), text("c")), "rebuild_from_type": call(name("torch._tensor", "_rebuild_from_type_v2"), system, text(touch), b"(t", b"}"),
        "numpy": call(name("numpy.testing._private.utils", "runstring"), text(expression), b"}"), "numpy_load": call(name("numpy", "load"), text("x.npy")),
        "runpy": call(name("runpy", "run_path"), text("x.py")), "importlib": call(name("importlib", "import_module"), text("antigravity")),
        "code": call(name("types", "FunctionType"), b"N"), "ctypes": call(name("ctypes", "CDLL"), text("libc.so.6")), "webbrowser": call(name("webbrowser", "open"), text("http://x")),
        "build": name("collections", "OrderedDict") + b"(tR}" + text("__setstate__") + system + b"sb",
        "setstate": b"}" + text("__reduce__") + system + b"sb", "newobj": name("subprocess", "Popen") + b"(" + text(touch) + b"t\x81",
        "newobj_ex": name("subprocess", "Popen") + b"(" + text(touch) + b"t}\x92", "inst": b"(" + text(touch) + b"ios\nsystem\n",
        "obj": b"(" + system + text(touch) + b"o", "stack_global": text("os") + text("system") + b"\x93(" + text(touch) + b"tR", "ext": b"\x82\xf0(" + text(touch) + b"tR",
        "persid": b"Pos.system\n", "binpersid": b"(" + text("storage") + system + text("0") + text("cpu") + b"K\x04tQ", "persistent": text(touch) + b"Q",
        "spaces": name("collections OrderedDict\x0b", "x") + b"(tR", "dots": call(name("typing", "..os.system"), text(touch)),
        "reconstructor": call(name("copyreg", "_reconstructor"), name("subprocess", "Popen"), name("builtins", "object"), b"N"),
        "bytes_of_memory": call(name("builtins", "bytearray"), integer(10**11)),
    }
    return {kind: state(model=b"}" + text("w") + tensor() + b"s", args=code) for kind, code in made.items()}


def resources():
    "Pickles that would take all memory or time, or crash an interpreter, if read naively."
    nest = 300_000
    return {
        "memo": b"\x80\x02}r\xff\xff\xff\xff.", "laughs": b"\x80\x02]" + b"2\x86"*5000 + b".", "tuple_key": b"\x80\x02})" + b"\x85"*nest + b"K\x01s.",
        "lists": b"\x80\x02" + b"]"*nest + b"a"*(nest - 1) + b".", "marks": b"\x80\x02" + b"("*nest + b".", "long_text": b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.",
        "long_number": b"\x80\x02\x8b\xff\xff\xff\x7f.", "decimal": b"\x80\x02L" + b"9"*nest + b"L\n.", "big": b"\x80\x02" + b"N"*9_000_000 + b".",
        "many_axes": state(w=tensor(size=(2,)*20, stride=(1,)*20)), "huge_axes": state(w=tensor(size=(2**80, 2), stride=(1, 1))), "huge_size": state(w=tensor(size=(2**40,))),
        "repeated": state(w=tensor(size=(2**20, 2**20), stride=(0, 0))), "negative": state(w=tensor(offset=-4)), "outside": state(w=tensor(offset=2)), "strided": state(w=tensor(stride=(2,))),
        "other_count": state(w=tensor(storage(count=2**30), size=(2**30,))), "no_storage": state(w=tensor(storage("7"))), "no_kind": state(w=tensor(storage(kind="Storage"))),
        "shared": state(**{f"w{i}": tensor() for i in range(5000)}), "no_numbers": state(w=tensor(size=(0, 2**62), stride=(1, 1))), "itself": b"\x80\x02}q\x00" + text("model") + b"h\x00s.",
        "empty": b"", "only_stop": b".", "no_stop": b"\x80\x02}", "no_dict": b"\x80\x02]K\x01a.", "no_tensor": state(w=b"K\x03"), "long_name": state(**{"a\nb"*1000: tensor()}), "good": state(w=tensor()), "number_as_name": b"\x80\x02}K\x01" + tensor() + b"s.",
        "truncated_name": b"\x80\x02cos", "not_a_pickle": b"hello", "module_is_number": b"\x80\x04K\x01K\x02\x93.", "uncalled": state(w=name("collections", "OrderedDict")),
    }


def containers(folder):
    "Files whose outside is wrong."
    good = state(w=tensor())
    archive(folder/"compressed.pt", good, zipfile.ZIP_DEFLATED, **{"data/1": bytes(10**8)})
    archive(folder/"no_pickle.pt", good)
    with zipfile.ZipFile(folder/"no_pickle.pt", "w") as z: z.writestr("a/other", b"x")
    archive(folder/"script.pt", good, **{"constants.pkl": b"."})
    archive(folder/"two.pt", good, **{"b/data.pkl": good})
    archive(folder/"big_endian.pt", good, byteorder=b"big")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(folder/"twice.pt", "w") as z:
            for entry in ("a/data.pkl", "a/DATA.pkl"): z.writestr(entry, good)
    archive(folder/"whole.pt", good)
    whole = (folder/"whole.pt").read_bytes()
    (folder/"cut.pt").write_bytes(whole[:-30])
    (folder/"begin_cut.pt").write_bytes(whole[20:])
    (folder/"flag.pt").write_bytes(whole.replace(b"PK\x01\x02\x14\x03\x14\x00\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01\x00"))
    (folder/"header.pt").write_bytes(whole[:whole.index(b"PK\x03\x04", 4)] + b"XX" + whole[whole.index(b"PK\x03\x04", 4) + 2:])
    with tarfile.open(folder/"legacy.tar", "w") as tar:
        info = tarfile.TarInfo("pickle")
        info.size = len(good)
        tar.addfile(info, io.BytesIO(good))
    torch.save({"w": torch.ones(4)}, folder/"legacy.pt", _use_new_zipfile_serialization=False)
    (folder/"bare.pkl").write_bytes(call(name("os", "system"), text("true")) + b".")
    (folder/"gzip.pt").write_bytes(b"\x1f\x8b\x08" + bytes(99))
    (folder/"nothing.pt").write_bytes(b"")
    (folder/"header.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}" + bytes(99))
    (folder/"offsets.safetensors").write_bytes(struct.pack("<Q", 64) + b'{"w":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'.ljust(64) + bytes(8))
    save_file({"w": torch.ones(4)}, folder/"other.safetensors")
    (folder/"cut.safetensors").write_bytes((folder/"other.safetensors").read_bytes()[:-3])
    os.mkfifo(folder/"fifo.pt")
    (folder/"folder.pt").mkdir()
    (folder/"whole.pt").unlink()


READER = """
import copyreg, json, os, resource, sys, time
from pathlib import Path
from defi_nb.weights.official import load_gidm, load_policy
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
copyreg.add_extension("os", "system", 0xf0)
events = []
watched = "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect", "ctypes.dlopen"
sys.addaudithook(lambda event, args: events.append(event) if event in watched or event == "pickle.find_class" and args[0] not in ("collections", "torch._utils", "torch") else None)
for path in sorted(Path(sys.argv[1]).iterdir()):
    for load in (load_gidm, load_policy):
        start = time.perf_counter()
        try: load(path)
        except Exception as e: found = type(e).__name__, str(e)
        else: found = "loaded", ""
        print(json.dumps([path.name, *found, time.perf_counter() - start, events]), flush=True)
        events.clear()
"""


def read_all(folder):
    "What a process of its own, with bounded memory, finds in each file of a folder: name, error, message, seconds, audited events."
    done = subprocess.run([sys.executable, "-c", READER, str(folder)], cwd=ROOT, env=ENV | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_refused(found, folder, at_least):
    assert len({line[0] for line in found}) >= at_least
    for file, error, message, seconds, events in found:
        assert error == "ValueError", f"{file}: {error} {message}"
        assert message.startswith(str(folder/file)) and "\n" not in message and len(message) < 700, message
        assert seconds < 30, f"{file} took {seconds:.0f} s"
        assert not events, f"{file}: {events}"


def test_hostile_pickles_run_nothing(tmp_path):
    (folder := tmp_path/"files").mkdir()
    for kind, code in gadgets(tmp_path/"executed").items(): archive(folder/f"{kind}.pt", code)
    found = read_all(folder)
    check_refused(found, folder, 35)
    assert not (tmp_path/"executed").exists()
    assert any("names os.system, which no checkpoint needs" in line[2] for line in found)


def test_the_archives_by_hand_are_sound(tmp_path):
    "Without the attack, and with names that are allowed, the same files can be read: by torch, and by our own machine."
    inert = call(name("omegaconf.dictconfig", "DictConfig"), text("x")) + b"}" + text("a") + call(name("functools", "partial"), name("builtins", "dict")) + b"sb"
    for file, code in (("plain", state(w=tensor())), ("beside", state(model=b"}" + text("w") + tensor() + b"s", args=inert))):
        archive(tmp_path/file, code)
        assert read_tensors(tmp_path/file)["w"].tolist() == [1, 2, 3, 4]


def test_the_gadgets_are_real(tmp_path):
    "The same pickle does run where nobody guards."
    code = pickle.loads(gadgets(tmp_path/"executed")["eval"].replace(storage(), b"N").replace(b"ctorch._utils\n_rebuild_tensor_v2\n", b"cbuiltins\nprint\n"))
    code["args"].close()
    assert (tmp_path/"executed").exists()


def test_costly_pickles_end_soon(tmp_path):
    for kind, code in resources().items(): archive(tmp_path/f"{kind}.pt", code)
    check_refused(read_all(tmp_path), tmp_path, 30)


def test_wrong_containers(tmp_path):
    containers(tmp_path)
    check_refused(read_all(tmp_path), tmp_path, 20)


def test_an_inert_name_is_not_imported(tmp_path):
    "A module that lies on the path under an allowed name is left alone."
    (tmp_path/"modules"/"omegaconf").mkdir(parents=True)
    (tmp_path/"modules"/"omegaconf"/"__init__.py").write_text(f"open({str(tmp_path/'executed')!r}, 'w')")
    gidm = small_gidm()
    export_gidm(gidm, tmp_path/"a.ckpt")
    module = tmp_path/"modules"
    code = ("import sys, torch, omegaconf; omegaconf.A = type('A', (), {'__module__': 'omegaconf.a'}); sys.modules['omegaconf.a'] = omegaconf; "
            "from defi_nb.core.safe_load import read_tensors; torch.save({'state_dict': read_tensors(sys.argv[1]), 'hyper_parameters': omegaconf.A()}, sys.argv[2])")
    environment = ENV | {"PYTHONPATH": f"{ROOT}{os.pathsep}{module}"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path/"a.ckpt"), str(tmp_path/"b.ckpt")], env=environment, check=True, timeout=300)
    (tmp_path/"executed").unlink()
    code = "import sys; from defi_nb.weights.official import load_gidm; load_gidm(sys.argv[1]); assert 'omegaconf' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(tmp_path/"b.ckpt")], env=environment, check=True, timeout=300)
    assert not (tmp_path/"executed").exists()


# ---- round trips ----

def small_gidm(): return GIDM(GIDMConfig(in_dim=24, dim=128, enc_blocks=1, dec_blocks=1, heads=2, queries=3, codes=8, code_dim=16, text_dim=40))


def small_policy():
    adapter = replace(AdapterConfig.paper(), dim=96, enc_blocks=1, dec_blocks=1, heads=2, goal_dim=20, goal_hidden=28, video_dim=96, latent_dim=128)
    return CoupledPolicy(replace(PolicyConfig.paper(), spec=replace(DataSpec.paper(), frames=6), frames=tuple(range(6)), feature_dim=40, project_hidden=32, former_dim=96,
                                 former_depth=1, former_queries=3, former_heads=2, former_hidden=48, gidm=replace(small_gidm().cfg, dec_blocks=0), adapter=adapter), None)


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("file", ["policy.safetensors", "policy.pt", "policy"])
def test_round_trip_of_a_policy(tmp_path, file):
    policy = small_policy()
    export_policy(policy, tmp_path/file)
    raw = torch.load(tmp_path/file, weights_only=True)["model"] if file.endswith(".pt") else load_file(tmp_path/file)
    assert same(raw, {official_name(n): t for n, t in policy.state_dict().items() if not n.endswith(OURS)})
    assert {n.split(".")[0] for n in raw} == {"lam", "Video_Former", "goal_emb", "time_pos_emb", "model"}
    assert same(load_policy(tmp_path/file).state_dict(), policy.state_dict())
    export_policy(load_policy(str(tmp_path/file)), tmp_path/f"again_{file}")
    assert (tmp_path/f"again_{file}").read_bytes() == (tmp_path/file).read_bytes() or file.endswith(".pt") # an archive knows its own name
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".part")] == []


@pytest.mark.parametrize("file", ["gidm.safetensors", "gidm.ckpt"])
def test_round_trip_of_a_gidm(tmp_path, file):
    gidm = small_gidm()
    export_gidm(gidm, tmp_path/file)
    assert same(load_gidm(tmp_path/file).state_dict(), gidm.state_dict())


def test_prefixes_and_wrappers():
    gidm, policy = small_gidm(), small_policy()
    bare = {n: t for n, t in gidm.state_dict().items() if not n.endswith(OURS)}
    prefixes = ("", "lam.", "module.", "module.lam.", "_orig_mod.lam.", "module._orig_mod.", "_orig_mod.module.lam.", "lam._orig_mod.", "model.lam.", "ema.module.", "model._fsdp_wrapped_module.lam.")
    for prefix in prefixes:
        for wrap in (lambda s: s, lambda s: {"state_dict": s, "epoch": 1}, lambda s: {"ema": {"shadow": s}, "opt": {0: {}}}, lambda s: {"model_state_dict": s}):
            assert same(load_gidm(wrap({prefix + n: t for n, t in bare.items()})).state_dict(), gidm.state_dict())
    official = {official_name(n): t for n, t in policy.state_dict().items() if not n.endswith(OURS)}
    started = lambda start: {start + n: t for n, t in official.items()}
    for given in (official, {"model": official, "args": None}, *map(started, ("module.", "model.", "_orig_mod.module.", "ema_model.module.", "policy._orig_mod."))):
        assert same(load_policy(given).state_dict(), policy.state_dict())


def wrapped(model):
    "A model's tensors as torch's own wrappers name them: compiled inside and outside, averaged; a checkpointed block as FSDP saves it."
    from torch.optim.swa_utils import AveragedModel
    model.encoder = torch.compile(model.encoder)
    tensors = AveragedModel(torch.compile(model)).state_dict()
    return {n.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module."): t for n, t in tensors.items() if not n.endswith(OURS)}


def test_torchs_own_wrappers(tmp_path):
    "With wrappers inside one another, and running weights beside averaged ones: all of the averaged are taken."
    gidm = small_gidm()
    averaged = wrapped(deepcopy(gidm))
    assert "n_averaged" in averaged and all(any(word in n for n in averaged) for word in ("module.", "._orig_mod.", "._checkpoint_wrapped_module."))
    running = {n: torch.full_like(t, 9) for n, t in gidm.state_dict().items()}
    torch.save({"model": running, "ema": averaged, "optimizer": {"state": {0: {"exp_avg": torch.ones(1)}}}}, tmp_path/"a.pt")
    assert same(load_gidm(tmp_path/"a.pt").state_dict(), gidm.state_dict())


@pytest.mark.parametrize("change, message", [
    (lambda s: s.pop("lam.to_codebook.bias"), "1 missing: lam.to_codebook.bias 16"),
    (lambda s: s.update(extra=torch.ones(2)), "1 unexpected: extra 2"),
    (lambda s: s.update({"lam.extra": torch.ones(())}), "1 unexpected: lam.extra scalar"),
    (lambda s: s.update({"time_pos_emb": torch.ones(2, 1, 23)}), "1 of another shape: time_pos_emb 2x1x23, not 2x1x24"),
    (lambda s: s.update({"lam.action_latent": torch.ones(3)}), "lam.action_latent has shape 3, where 4 axes are expected"),
    (lambda s: s.pop("model.inner_model.tok_emb_token.weight"), "has no model.inner_model.tok_emb_token.weight"),
    (lambda s: s.update({"Video_Former.latents": torch.ones(3, 3, 96)}), "frames (0, 1, 2)"),
    (lambda s: [s.update({n.replace("lam.", "lam2."): s.pop(n)}) for n in list(s)], "has no lam.encoder.ffn.1.weight"),
    (lambda s: s.clear() or s.update(a=torch.ones(1)), "has no Video_Former.latents"),
    (lambda s: s.clear(), "holds no state dict"),
])
def test_what_does_not_fit_is_listed(change, message):
    official = {official_name(n): t for n, t in small_policy().state_dict().items() if not n.endswith(OURS)}
    change(official)
    with pytest.raises(ValueError) as e: load_policy(official)
    assert message in str(e.value) and "\n" not in str(e.value)


def test_wrong_preset(tmp_path):
    "A policy of another config cannot be exported, and one cannot be started from a GIDM of another size."
    with pytest.raises(ValueError, match="the release would compute something else"): export_gidm(GIDM(replace(small_gidm().cfg, heads=4)), tmp_path/"a.pt")
    with pytest.raises(ValueError) as e: export_policy(CoupledPolicy(PolicyConfig.tiny(), None), tmp_path/"a.pt")
    assert "\n" not in str(e.value) and not list(tmp_path.iterdir())
