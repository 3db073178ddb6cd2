"A mixture's draws are a function of their numbers: the same after a kill, on any worker, other ones on each rank."
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ENV
from torch.utils.data import DataLoader

from defi_nb.data.mixtures import (
    BLOCK, GIDM_WEIGHTS, MIXTURES, TABLE_12, Mixture, count_draws, indices_of, weights_by_size,
    normalise_weights, shuffled)
from defi_nb.core.spec import Batch
from defi_nb.train.config import StepSampler, TrainConfig
from defi_nb.train.fit import fit


class Numbers:
    "A dataset of n samples whose pictures carry their numbers."
    def __init__(self, name, n, **shape):
        self.name, self.n, self.shape = name, n, (1, 2, 3, shape.get("size", 4), shape.get("size", 4))

    def __len__(self): return self.n

    def __getitem__(self, indices):
        i = torch.as_tensor(np.asarray(indices))
        assert len(i) and i.min() >= 0 and i.max() < self.n
        return Batch(text=[f"{self.name} {k}" for k in i.tolist()], video=(i % 256).to(torch.uint8).view(-1, 1, 1, 1, 1, 1).expand(-1, *self.shape).contiguous())


SIZES = dict(a=10_000, b=77, c=5, d=1)


def mixture(draws=100_000, seed=0, weights=None):
    return Mixture({n: Numbers(n, size) for n, size in SIZES.items()}, weights or dict(a=.5, b=.3, c=.199, d=.001), draws, seed)


def test_shares_are_exact_in_the_long_run_and_nearly_in_each_block():
    mix = mixture()
    for start in range(0, 90*BLOCK, 9*BLOCK):
        counts = count_draws(mix, np.arange(start, start + BLOCK))
        assert all(abs(counts[n] - s*BLOCK) <= 1 for n, s in mix.shares.items())
    counts = count_draws(mix, np.arange(90*BLOCK))
    assert all(abs(counts[n] - s*90*BLOCK) <= 3 for n, s in mix.shares.items()), counts
    assert sum(count_draws(mix).values()) == len(mix)
    rare = Mixture({"big": Numbers("big", 9), "rare": Numbers("rare", 9)}, dict(big=1 - 1e-4, rare=1e-4), 10**6)
    assert abs(count_draws(rare)["rare"] - 100) <= 2 # a tenth of a draw in each block, and still its turn


def test_every_sample_equally_often():
    mix = mixture()
    which, sample = mix.locate(np.arange(8*BLOCK))
    for d, n in enumerate(SIZES.values()): assert np.ptp(np.bincount(sample[which == d], minlength=n)) <= 1


def test_one_draw_depends_on_nothing_but_its_number():
    mix, again = mixture(), mixture()
    order = np.random.default_rng(0).integers(0, len(mix), 300)
    whole = mix[order]
    assert [again[[i]].text[0] for i in order] == whole.text
    assert mix[order[::-1].copy()].text == whole.text[::-1]
    assert mix[int(order[0])].text == whole.text[:1] and mix[torch.from_numpy(order)].text == whole.text
    assert mixture(seed=1)[order].text != whole.text
    assert mixture(draws=2*len(mix))[order].text == whole.text # a longer run begins alike
    with pytest.raises(IndexError, match="give it more draws"): mix[[len(mix)]]


def test_another_process_draws_the_same(tmp_path):
    script = ("import sys; sys.path.insert(0, sys.argv[1]); from test_mixtures import mixture\n"
              "print(mixture()[[5, 99_999, 31_000]].text)")
    done = subprocess.run([sys.executable, "-c", script, os.path.dirname(__file__)], capture_output=True, text=True, env=ENV | {"PYTHONHASHSEED": "7"})
    assert done.stdout.strip() == str(mixture()[[5, 99_999, 31_000]].text), done.stderr


def test_ranks_share_no_draw_and_a_resumed_run_goes_on():
    mix, steps, ranks = mixture(), 12, 3
    drawn = [indices_of(s, 8, r, ranks) for s in range(steps) for r in range(ranks)]
    assert sorted(np.concatenate(drawn).tolist()) == list(range(steps*ranks*8))
    def texts(start, rank, workers):
        return [b.text for b in DataLoader(mix, sampler=[indices_of(s, 8, rank, ranks) for s in range(start, steps)], batch_size=None, num_workers=workers)]
    for rank in range(ranks):
        whole = texts(0, rank, 0)
        for start, workers in ((1, 0), (7, 2), (11, 1)): assert texts(start, rank, workers) == whole[start:]
    one = np.concatenate([indices_of(s, 24) for s in range(steps)]) # the same global batch on one rank: the same draws
    assert sorted(mix[one].text) == sorted(t for d in drawn for t in mix[d].text)


def test_with_the_sampler_of_fit():
    mix = mixture(draws=960)
    sampler = StepSampler(len(mix), 32, 30)
    drawn = np.concatenate([sampler.at(s) for s in range(30)])
    assert sorted(drawn.tolist()) == list(range(960))
    assert count_draws(mix, drawn) == count_draws(mix)

    class Toy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(()))
        def loss(self, batch): return (self.w - batch.video.float().mean()/255).square(), {}
    cfg = TrainConfig(steps=5, batch_size=16, log_every=1)
    assert fit(Toy(), mix, cfg)[-1]["loss"] == fit(Toy(), mix, cfg)[-1]["loss"]


def test_shuffles():
    for n in [*range(1, 40), 255, 256, 257, 1000]:
        for key in ((0,), (3, 1, 2)): assert np.sort(shuffled(np.arange(n), n, key)).tolist() == list(range(n))
    x = shuffled(np.arange(100_000), 100_000, (5,)).astype(float)
    assert abs(np.corrcoef(x, np.arange(100_000))[0, 1]) < .02 and abs(np.corrcoef(x[1:], x[:-1])[0, 1]) < .02


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="video of one sample differs in shape"): Mixture({"a": Numbers("a", 3), "b": Numbers("b", 3, size=8)}, dict(a=1, b=1))
    with pytest.raises(ValueError, match="names 'x', which is not among a"): Mixture({"a": Numbers("a", 3)}, dict(a=1, x=1))
    with pytest.raises(ValueError, match="'a' has no samples"): Mixture({"a": Numbers("a", 0)}, dict(a=1))
    for weight in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="weights above 0"): mixture(weights=dict(a=1, b=1, c=1, d=weight))
    assert mixture(weights=dict(a=6, b=2, c=1, d=1)).shares == dict(a=.6, b=.2, c=.1, d=.1)


def test_named_mixtures():
    assert all(abs(sum(shares.values()) - 1) < 1e-9 for shares in MIXTURES.values())
    assert len(TABLE_12) == 27 == len(GIDM_WEIGHTS) and all(d.name == name and d.hz > 0 and d.image and d.text for name, d in TABLE_12.items())
    assert normalise_weights(MIXTURES["release_gfdm"], ["ssv2", "bridge"]) == {"ssv2": .4/(.4 + .2), "bridge": .2/(.4 + .2)}
    shares = weights_by_size(GIDM_WEIGHTS, dict(viola=100, toto=200))
    assert shares == dict(viola=.5, toto=.5)
