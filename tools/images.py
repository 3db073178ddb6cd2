"""The images of README.md, the start page and the docs: `python tools/images.py WHAT`.

`rollout` films a chain of an evaluation again, with what the policy's GFDM predicts in one denoising step, as the policy
reads it; `results` draws results/coupling, `unlabelled` results/unlabelled_task, `labels` results/data_efficiency, `curve`
results/success_curve; `gallery` takes stored outputs of notebooks. They are written to nbs/images.
"""
import argparse
import base64
import io
import json
import re
from dataclasses import replace
from pathlib import Path

from PIL import Image, ImageOps

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT/"nbs"/"images"
SIZE = 320, 200  # of an image of the gallery, pixels
WHOLE = 0, 0, 1, 1
GALLERY = {  # name -> notebook, number of the image among its outputs, fractions to keep (left, top, right, bottom)
    "scenes": ("01_sim/04_playtable", 0, (0, 0, .75, .6)), "experts": ("01_sim/05_experts", 2, (0, 0, .6, .52)),
    "features": ("04_models/03_encoders", 1, (.16, .1, .75, .52)),
    "diffusion": ("04_models/01_diffusion", 1, WHOLE),
    "codes": ("08_analysis/05_latent_plots", 2, WHOLE), "attention": ("10_explore/04_export", 4, WHOLE),
    "denoising": ("09_viz/06_action_sampling", 1, WHOLE), "serving": ("11_serve/03_robot_loop", 0, WHOLE)}


def save_gif(
    frames,  # of one size, (H,W,3) uint8
    path,
    fps:float,
    colours:int=64,  # of the palette, which all frames share
):
    "A small GIF."
    images = [Image.fromarray(f) for f in frames]
    sample = Image.new("RGB", (images[0].width, images[0].height*8))
    for i in range(8): sample.paste(images[i*len(images)//8], (0, i*images[0].height))
    palette = sample.quantize(colours, kmeans=4)  # without it, the few pixels of a block lose their colour
    first, *rest = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    first.save(path, save_all=True, append_images=rest, duration=round(1000/fps), loop=0, optimize=True)


def rollout(
    run,  # folder of an eval_calvin run with kept actions
    number:int=0,  # of the chain
    name:str="rollout",  # of the GIF
    every:int=7,  # control steps between two frames
):
    "A chain of tasks: both cameras, what was predicted half a second ahead, and the actions."
    from defi_nb.core.spec import CONTROL_HZ
    from defi_nb.eval.evaluate import read_records
    from defi_nb.eval.failures import watch
    from defi_nb.eval.film import film_chain
    from defi_nb.run.players import eval_config, find_chains
    from defi_nb.weights.load import load_model
    from defi_nb.weights.zoo import checkpoint_path
    given = json.loads((run/"parameters.json").read_text())
    sequences, source = find_chains(given["tasks"], given["chains"], given["split"], given["simulation"]["length"])
    config = eval_config("tiny", given["split"], source, group=given["simulation"]["group"],
                         **{k: given[k] for k in ("steps", "execute", "seed", "precision")})
    record = next(r for r in read_records(run) if r["chain"] == number)
    rows = watch(load_model(checkpoint_path(given["policy"], "coupled")), record, sequences[number], config, steps=1)
    last = lambda query: replace(query, frames={v: f[-1:] for v, f in query.frames.items()}, offsets=query.offsets[-1:])
    frames = film_chain(record, sequences[number], config, every=every, queries=[last(row["query"]) for row in rows])
    save_gif([f for f in frames if f.shape == frames[-1].shape], IMAGES/f"{name}.gif", CONTROL_HZ/every)


def _bars(name, whole, xlabel):
    "Rows of results/NAME/table.md, with their intervals and each training."
    import matplotlib.pyplot as plt
    text = (ROOT/"results"/name/"table.md").read_text(encoding="utf-8")
    length = r"\*\*([\d.]+)\*\* \(([\d.]+)–([\d.]+)\)"
    rows = re.findall(rf"^\| ([^|]+) \| [\d.]+ \| {length} \| \d+ \| ([\d., ]+) \|", text, re.M)
    figure, ax = plt.subplots(figsize=(7.2, 2.4), layout="constrained")
    for y, (_, mean, low, high, seeds) in enumerate(rows):
        ax.plot([float(low), float(high)], [y, y], lw=7, color="C0", alpha=.3, solid_capstyle="butt")
        ax.plot([float(x) for x in seeds.split(",")], [y]*len(seeds.split(",")), "o", ms=3, color=".35")
        ax.plot(float(mean), y, "|", ms=12, mew=2, color="C0")
    ax.set(yticks=range(len(rows)), yticklabels=[r[0] for r in rows], xlim=(-.01*whole, whole), xlabel=xlabel)
    ax.invert_yaxis()
    ax.grid(axis="x", alpha=.3)
    return figure


def results():
    "Average lengths of results/coupling."
    _bars("coupling", 5, "tasks solved in a row, of 5").savefig(IMAGES/"results.png", dpi=110)


def unlabelled():
    "Success of results/unlabelled_task."
    figure = _bars("unlabelled_task", 1, "share of blue blocks lifted; lifting them was shown by video alone")
    figure.savefig(IMAGES/"unlabelled_task.png", dpi=110)


def labels():
    "Average lengths of results/data_efficiency over the number of demonstrations with actions."
    from defi_nb.eval.published import show_efficiency
    metrics = json.loads((ROOT/"results"/"data_efficiency"/"metrics.json").read_text(encoding="utf-8"))
    figure = show_efficiency(metrics["table"], metrics["demonstrations"])
    figure.savefig(IMAGES/"data_efficiency.png", dpi=90)


def curve():
    "Average lengths of results/success_curve over the optimiser steps of the trainings."
    from defi_nb.eval.published import show_by_fraction
    metrics = json.loads((ROOT/"results"/"success_curve"/"metrics.json").read_text(encoding="utf-8"))
    show_by_fraction(metrics["curve"], "step").figure.savefig(IMAGES/"success_curve.png", dpi=90)


def gallery():
    "Stored outputs of notebooks, small and of one size."
    (IMAGES/"gallery").mkdir(exist_ok=True)
    for name, (notebook, number, box) in GALLERY.items():
        cells = json.loads((ROOT/"nbs"/f"{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]
        outputs = [o.get("data", {}) for c in cells for o in c.get("outputs", ())]
        data = [o[kind] for o in outputs for kind in ("image/png", "image/jpeg") if kind in o]
        image = Image.open(io.BytesIO(base64.b64decode("".join(data[number])))).convert("RGB")
        image = image.crop([round(f*side) for f, side in zip(box, image.size*2)])
        small = ImageOps.pad(image, SIZE, color="white").quantize(96, kmeans=4)
        small.save(IMAGES/"gallery"/f"{name}.png", optimize=True)


STORED = {f.__name__: f for f in (results, unlabelled, labels, curve, gallery)} # that need no run


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("rollout", *STORED))
    parser.add_argument("--run", type=Path, default=ROOT/"runs/demo/eval_shipped", help="evaluation to film")
    parser.add_argument("--chain", type=int, default=0, help="number of its chain")
    parser.add_argument("--name", default="rollout", help="of the GIF")
    parser.add_argument("--every", type=int, default=7, help="control steps between two of its frames")
    given = parser.parse_args()
    if given.what == "rollout": rollout(given.run, given.chain, given.name, given.every)
    else: STORED[given.what]()
