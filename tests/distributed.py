"""What `test_processes.py` starts several of: train as each job of the JSON in the first argument says, and write what came out.

Not a test by itself; it is started by torchrun, and each process writes OUT/rank<N>.json.
"""
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn

from defi_nb.data.episodes import WindowDataset, fake_frames
from defi_nb.train.config import TrainConfig
from defi_nb.train.fit import fit
from defi_nb.models.vq import VectorQuantizer


class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, 2*width), nn.GELU(), nn.Linear(2*width, width))

    def forward(self, x): return x + self.net(x)


class Net(nn.Module):
    "No random numbers in its loss, so that parts of a batch and the whole agree."
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Layer(15), Layer(15)])
        self.out = nn.Linear(15, 70)

    def loss(self, batch):
        x = batch.proprio
        for layer in self.layers: x = layer(x)
        error = (self.out(x) - batch.action.flatten(1)).square()
        return error.mean(), {"gripper": error[:, 6::7].mean()}


class Coded(Net):
    "With a codebook that restarts dead codes at random, and dropout."
    def __init__(self):
        super().__init__()
        self.vq, self.dropout = VectorQuantizer(8, 15, restart_below=.5), nn.Dropout(.1)

    def loss(self, batch):
        q = self.vq(self.dropout(self.layers[0](batch.proprio))[:, None])
        time.sleep(.01*self.training) # long enough to be killed in
        error = (self.out(q.z_q[:, 0]) - batch.action.flatten(1)).square().mean()
        return error + q.loss + 0*self.layers[1](batch.proprio).sum(), {}


def stage(name):
    "A tiny stage of ours and made-up data for it."
    from defi_nb.run.pretrained import fresh_model
    from defi_nb.models.encoders import load_encoders
    from defi_nb.models.policy import PlainConfig, PlainPolicy
    import numpy as np
    encoders, frames, rng = load_encoders("tiny"), fake_frames({"open_drawer": 2}, image_size=8), np.random.default_rng(0)
    if name == "plain":
        model, arrays, offsets = PlainPolicy(PlainConfig.tiny(), encoders), {"latent": rng.normal(size=(len(frames), 2, encoders.vae.channels, 8, 8))}, (0,)
    elif name == "gfdm":
        model, arrays, offsets = fresh_model("gfdm", encoders), {"latent": rng.normal(size=(len(frames), 2, encoders.vae.channels, 8, 8))}, (0, 5, 10, 15)
    else:
        model = fresh_model("gidm", encoders)
        arrays, offsets = {"dino": rng.normal(size=(len(frames), 2, 64, model.cfg.in_dim))}, (0, 10)
    return model, WindowDataset(frames, frames.windows, offsets=offsets, chunk=10*(name == "plain"), arrays=arrays)


def main(job):
    rank, out = int(os.environ.get("RANK", 0)), Path(job["out"])
    out.mkdir(parents=True, exist_ok=True)
    if job["model"] in ("gfdm", "gidm", "plain"): model, data = stage(job["model"])
    else:
        frames = fake_frames({"open_drawer": 3})
        model, data = {"net": Net, "coded": Coded}[job["model"]](), WindowDataset(frames, frames.windows, chunk=10)
    def die(row):
        time.sleep(job.get("pause", 0))
        if row["step"] == job.get("die_at"): os.kill(os.getpid(), signal.SIGKILL)
    cfg = TrainConfig(device="cpu", num_threads=1, **job["cfg"])
    history = fit(model, data, cfg, out/"ckpt", on_log=die, val_data=data, info={})
    digest = hashlib.sha256(b"".join(t.detach().contiguous().numpy().tobytes() for t in model.state_dict().values())).hexdigest()
    (out/f"rank{rank}.json").write_text(json.dumps({"history": history, "digest": digest}))


def run_jobs(jobs):
    for job in jobs: main(job)


if __name__ == "__main__": run_jobs(json.loads(sys.argv[1]))
