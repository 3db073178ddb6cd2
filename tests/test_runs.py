"""The run notebooks with small parameters, in a scratch project, so that nothing of the user's is used or touched.

`SMALL` has an entry for each run notebook, in the order in which they build on one another; a new notebook without one fails.
"""
import json
import shutil

import pytest
from conftest import ROOT, RUNS, command, last_line
from safetensors.torch import load_file
from warm import defi_nb, forked

from defi_nb.run import launch
from defi_nb.train.metrics import CLOCK

DATA = {"tasks": "open_drawer,move_slider_left,turn_on_led,lift_red_block_table,push_pink_block_right", "demos": 5} # of five kinds
TRAIN = {"steps": 4, "engine.batch_size": 4}
EVAL = {"tasks": DATA["tasks"], "chains": 2}
SMALL = { # run notebook -> its parameters at a size that takes seconds; the first makes the data and the models that the others find
    "train_coupled": DATA | TRAIN | {"pretrained.steps": 4},
    "monitor": {},
    "pretrain_gfdm": DATA | TRAIN | {"ckpt": "ckpts/forward"},
    "pretrain_gidm": DATA | TRAIN | {"ckpt": "ckpts/inverse"},
    "adapt_gfdm": {"tasks": "open_drawer", "demos": 2, "test_demos": 1, "steps": 2, "engine.batch_size": 2, "chains": 1, "parallel": 1},
    "align": DATA | TRAIN | {"pretrained.gfdm": "ckpts/forward", "pretrained.gidm": "ckpts/inverse", "ckpt": "ckpts/aligned"},
    "eval_gidm": DATA | {"stride": 10, "probes": "{'pairs': 40, 'steps': 2, 'gaps': '5', 'fractions': '1'}", "replays": 12, "scenes": "AD", "clips": 1},
    "eval_features": DATA | {"probes": "{'train_demos': 4, 'test_demos': 3, 'stride': 8, 'project': 4, 'hidden': 4, 'steps': 2}",
                             "sources": "gfdm,gidm", "gaps": "8", "pairs": 9, "denoising": "1", "draws": 3},
    "eval_frozen": DATA | {"test_tasks": "open_drawer", "rollouts": 1, "steps": 8, "probes": "{'project': 4, 'hidden': 4, 'steps': 2}"},
    "ladder": DATA | {"fractions": "0.3,1", "draws": 2, "reader": "{'steps': 2, 'epochs': 0.01}"},
    "gidm_reversal": DATA | TRAIN | {"arms": "penalty,labels", "seeds": 1, "fit_pairs": 40, "ckpts": "ckpts/reversal"},
    "eval_calvin": EVAL | {"steps": 20, "film": 1},
    "eval_gfdm": DATA | {"gfdm": "ckpts/forward", "clips": 6, "steps": "1,2", "dims": 1, "strips": 1},
    "denoising": DATA | {"moments": 1, "steps": "1,2", "schedule": 2, "clips": 4, "noises": 2},
    "failures": DATA | {"chains": 1, "steps": 20, "failures": 1, "control": 1, "draws": 1, "future.train_samples": 32, "future.test_samples": 16, "film": 1},
    "explore": DATA | {"data": "data", "at": 3, "steps": 1, "text": "close the drawer"},
    "pretrain_encoders": {"tasks": DATA["tasks"], "demos": 8, "vae_steps": 2, "dino_steps": 2, "text_steps": 2, "data": "data/encoders", "assets": "assets"},
    "pipeline": DATA | {"demos": 8, "data_frac": 0.5, "chains": 1, "steps_gfdm": 20, "steps_gidm": 20, "steps_align": 4, "steps_few": 4},
    "doctor": {"seconds": 5},
    "bench_loader": {"windows": 3, "samples": 32, "repeats": 1, "steps": 2},
    "bench_evaluation": {"chains": 2, "steps": 10, "group": 2, "workers": "0,1", "look_steps": 10},
    "bench_inference": {"parts": "text,adapter", "repeats": 2},
    "bench_serve": {"requests": 3, "clients": "2", "seconds": 0.2, "side": 32},
    "eval_simulators": {},
    "eval_real": {"trials": 1, "attempts": 1, "seconds": 0.7},
    "own_data": {"demos": 4, "steps": 4, "batch_size": 4},
    "state_aliasing": DATA | {"steps": 4, "batch_size": 4, "arms": "BC, PTR", "seeds": 1, "train_demos": 6, "test_demos": 6, "probe_steps": 2, "pairs": 10},
    "attention": DATA | {"pairs": 8, "columns": 2, "draws": 1, "video": "data/example_lab"},
    "ablations": DATA | {"rows": "without GIDM pretraining, plain: no video, MLP straight to actions", "chains": 1, "fractions": "1.0", "seeds": 1, "steps": 4,
                         "pretrain_steps": 4, "curve": 2, "ckpts": "ckpts/ablations"},
    "pretrain_zoo": DATA | {"video": "", "steps_gfdm": 4, "steps_gidm": 4, "steps_align": 2, "steps_policy": 4, "curve": "2", "chains": 1, "ckpts": "ckpts/zoo"},
    "data_efficiency": DATA | {"split": "D_D", "length": 2, "labelled": "open_drawer,turn_on_led", "rows": "plain: no video, blind", "labels": "2", "claims": "2", "seeds": 2, "steps": 4, "chains": 1, "ckpts": "ckpts/ablations"},
}

WRONG = [ # run notebook, parameters, what the one-line error must say
    ("train_coupled", {"data_fraq": 0.1}, "unknown parameter 'data_fraq': did you mean 'data_frac'?"),
    ("train_coupled", {"data_frac": 0}, "data_frac"),
    ("train_coupled", {"data_frac": "half"}, "parameter data_frac is 'half', which is not of type float"),
    ("train_coupled", {"tasks": "open_the_door"}, "open_the_door"),
    ("train_coupled", {"pretrained.gfdm": "ckpts/none"}, "ckpts/none holds no finished gfdm checkpoint"),
    ("train_coupled", {"pretrained.gfdm": "ckpts/inverse"}, "inverse"), # a checkpoint of another kind
    ("train_coupled", {"pretrained.gidm": "ckpts/inverse", "variant.quantiser": "fsq"}, "give variant.quantiser=vq, or another gidm"),
    ("train_coupled", {"policy": "plain", "auxiliary": "{'weight': 0.1}"}, "inverse dynamics goes with a direct or a coupled policy"),
    ("train_coupled", {"quantiser": "fsq"}, "unknown parameter 'quantiser': it is a key of variant; give -p variant.quantiser fsq"),
    ("train_coupled", {"pretrain_steps": 4}, "unknown parameter 'pretrain_steps': did you mean 'pretrained.steps'?"),
    ("train_coupled", {"variant.quantizer": "fsq"}, "variant has no key 'quantizer': did you mean 'quantiser'? It takes train, align, views"),
    ("train_coupled", {"variant": "quantiser=fsq"}, "parameter variant is 'quantiser=fsq', which is not of type dict"),
    ("state_aliasing", {"arms": "BC, AUX2"}, "no arm is called 'AUX2'; choose of BC, AUX, PTR"),
    ("eval_gidm", {"model": "ckpts/forward"}, "holds a GFDM; expected GIDM or CoupledPolicy"),
    ("eval_features", {"policy": "ckpts/inverse"}, "holds a GIDM; expected CoupledPolicy"),
    ("ladder", {"policy": "ckpts/inverse"}, "holds a GIDM; expected CoupledPolicy"),
    ("ladder", {"gfdm": "ckpts/forward"}, "the policy brings its own"),
    ("ladder", {"fractions": "0"}, "fraction is 0.0; it is a part of the demonstrations"),
    ("eval_features", {"sources": "pixels"}, "no source is called pixels: choose some of gfdm"),
    ("eval_calvin", {"policy": "ckpts/forward"}, "forward"),
    ("eval_calvin", {"policy": "ckpts/none"}, "ckpts/none holds no finished policy"),
    ("failures", {"policy": "ckpts/inverse"}, "inverse"),
    ("eval_gfdm", {"gfdm": "ckpts/inverse"}, "holds a GIDM; expected GFDM"),
    ("denoising", {"policy": "ckpts/forward"}, "forward"),
    ("failures", {"run": "runs/eval_calvin"}, "another policy or of other chains"),
    ("eval_calvin", {"split": "A_B"}, "no split is called 'A_B'"),
    ("pretrain_gfdm", {"split": "data/none"}, "data/none is not there: give the folder of a dataset"),
    ("pretrain_gfdm", {"split": "D_D*1, data/example_lab"}, "give a weight to each of the datasets, or to none"),
    ("train_coupled", {"split": "data/example_lab", "reading.columns": "knee"}, "no column 'knee'"),
    ("own_data", {"data": "data/playtable-D_D"}, "actions"),
    ("pretrain_gidm", {"split": "data/example_lab", "auxiliary.labels": 0.5}, "example_lab (own): actions beside video are read from recordings of the simulator"),
    ("eval_simulators", {"benchmark": "libero"}, "make one with `defi-nb bench setup simpler` or `defi-nb bench setup libero`"),
    ("eval_real", {"tasks": "fold"}, "no task is called 'fold'; Table 3 has place, open"),
    ("eval_simulators", {"benchmark": "gazebo"}, "no benchmark is called 'gazebo': choose simpler, libero"),
    ("pretrain_gfdm", {"preset": "paper"}, "the public ones come with defi-nb ckpts"),
]


BY_COMMAND = ("eval_calvin", "explore") # with kernels of their own; the others in forks (new interpreters for runs that start runs: test_interrupt.py)
WRONG_BY_COMMAND = WRONG[:2] # found before the run and in a cell


def run(name, *given, cwd): return (command if name in BY_COMMAND else defi_nb)(*["defi-nb"]*(name in BY_COMMAND), "run", name, *given, cwd=cwd)


def arguments(params): return [part for name, value in params.items() for part in ("-p", name, value)]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    "The project without its package, data, checkpoints and runs."
    scratch = tmp_path_factory.mktemp("project")
    shutil.copy(ROOT/"settings.ini", scratch)
    (scratch/"nbs").mkdir()
    for path in RUNS: shutil.copy(path, scratch/"nbs")
    return scratch


def test_every_run_notebook_has_a_small_size():
    assert sorted(SMALL) == [p.stem for p in RUNS]


@pytest.mark.parametrize("name", SMALL)
def test_run(project, name):
    done = run(name, "--out", f"runs/{name}", *arguments(SMALL[name]), cwd=project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (project/"runs"/name/"metrics.json").exists() and (project/"runs"/name/f"{name}.html").exists()


@pytest.mark.slow
def test_demonstration_from_random_weights(project):
    given = SMALL["pipeline"] | DATA | {"pretrain": "fresh", "steps_all": 4, "ckpts": "ckpts/fresh"}
    done = run("pipeline", "--out", "runs/fresh", *arguments(given), cwd=project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"coupled_all", "plain_all"} <= json.loads((project/"runs/fresh/metrics.json").read_text()).keys()


def test_papermill_itself(project):
    given = [*arguments(DATA | {"steps": 4, "data_frac": 0.5}), "-p", "engine", "{'batch_size': 4}", "-p", "pretrained", "{'steps': 4}"]
    done = command("papermill", "nbs/train_coupled.ipynb", *given, cwd=project)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("{")


def test_on_two_processes(project):
    "The same notebook on two processes at once: one checkpoint, one record; a second start finds it finished."
    given = ["train_coupled", "--out", "runs/two", *arguments(DATA | TRAIN | {"policy": "plain", "ckpt": "ckpts/two", "engine": "{'accumulate': 2, 'keep': 2}"})]
    done = command("torchrun", "--standalone", "--nproc-per-node", "2", "-m", "defi_nb.run.launch", *given, cwd=project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "running on 2 processes" in done.stdout and (project/"ckpts/two/model.safetensors").exists()
    first, second = (json.loads((project/"runs/two"/name).read_text()) for name in ("metrics.json", "rank1/metrics.json"))
    assert first.keys() == second.keys() and not [k for k in first if k not in CLOCK and first[k] != second[k]]
    assert "finished already" in forked(launch.main, list(map(str, given)), cwd=project).stdout
    shown = defi_nb("run", "monitor", "-p", "run", "runs/two", cwd=project)
    assert shown.returncode == 0, shown.stdout + shown.stderr


@pytest.mark.parametrize("pair", ["real", "imagined"])
def test_inverse_dynamics_beside_the_coupled_policy(project, pair):
    "The aligned projection learns on; features of a real pair are kept beside those of the present."
    given = DATA | TRAIN | {"ckpt": f"ckpts/beside_{pair}", "auxiliary": f"{{'pair': '{pair}', 'p_reverse': 0.5}}"}
    done = defi_nb("run", "train_coupled", "--out", f"runs/beside_{pair}", *arguments(given), cwd=project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "inverse" in json.loads((project/f"ckpts/beside_{pair}/metrics.jsonl").read_text().splitlines()[-1])
    projection = lambda name: load_file(project/f"ckpts/{name}/model.safetensors")["project.1.weight"]
    assert not projection(f"beside_{pair}").equal(projection("aligned-tiny-D_D"))
    if pair == "real": assert list((project/"data/playtable-D_D-encoded").glob("feature-*-1-pair-*"))


@pytest.mark.parametrize("policy", ["blind", "no_gidm", "coupled"])
def test_baselines_and_switches(project, policy):
    "The rows without images and without GIDM are trained and played; every switch of the coupling is a run parameter."
    switches = {"train": "gidm,adapter", "latents": "both", "present": 1, "feature_norm": 1, "frames": "0,1,3", "gidm_frames": "0,3", "proprio_dropout": 0.5, "vq_weight": 0.5,
                "commitment": 0.1, "restart_below": 0.0} if policy == "coupled" else {}
    more = {"engine.lr_scale": "{'gidm': 0.05, 'project': 0.05}"} if switches else {"variant.proprio": 0}
    given = DATA | TRAIN | {"policy": policy, "ckpt": f"ckpts/row_{policy}"} | {f"variant.{n}": v for n, v in switches.items()} | more
    done = defi_nb("run", "train_coupled", "--out", f"runs/row_{policy}", *arguments(given), cwd=project)
    assert done.returncode == 0, done.stdout + done.stderr
    done = defi_nb("run", "eval_calvin", "--out", f"runs/played_{policy}", *arguments(SMALL["eval_calvin"] | {"policy": f"ckpts/row_{policy}", "chains": 1, "film": 0}), cwd=project)
    assert done.returncode == 0, done.stdout + done.stderr


def test_folder_as_split(project):
    "A recording in CALVIN's format is read where it lies, through both pretrainings and the policy."
    given = TRAIN | {"split": "data/playtable-D_D", "tasks": "open_drawer,lift_red_block_table", "pretrained.steps": 4}
    done = defi_nb("run", "train_coupled", "--out", "runs/folder", *arguments(given), cwd=project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(p.name for p in (project/"ckpts").glob("*-tiny-playtable-D_D")) == [f"{kind}-tiny-playtable-D_D" for kind in ("aligned", "coupled", "gfdm", "gidm")]


def test_own_data_through_every_stage(project):
    "A folder of videos and CSV files, which test_run[own_data] has made, from pretraining to the coupled policy; and in a mixture with the simulator's."
    given = TRAIN | {"split": "data/example_lab", "pretrained.steps": 4}
    done = defi_nb("run", "train_coupled", "--out", "runs/own_coupled", *arguments(given), cwd=project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((project/"ckpts/coupled-tiny-example_lab/config.json").read_text())["info"]["action_scale"]["labels"][0] == "x_m"
    done = defi_nb("run", "pretrain_gfdm", "--out", "runs/mixture", *arguments(DATA | TRAIN | {"split": "D_D*1,data/example_lab*3", "ckpt": "ckpts/mixture"}), cwd=project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(json.loads((project/"runs/mixture/metrics.json").read_text())["shares"]) == {"playtable-D_D", "example_lab"}


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: f"{wrong[0]}-{wrong[2]}")
def test_wrong_input(project, wrong):
    name, params, said = wrong
    given = ("run", name, *arguments(SMALL[name] | params))
    done = command("defi-nb", *given, cwd=project) if wrong in WRONG_BY_COMMAND else defi_nb(*given, cwd=project)
    assert done.returncode in (1, 2) and said in last_line(done.stderr), done.stderr
