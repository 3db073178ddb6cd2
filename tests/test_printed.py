"Both papers' tables as data: every row adds up, or is marked with what it comes to."
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import ROOT

from defi_nb.core.printed import printed_markdown, printed_table, printed_tables, row_marks
from defi_nb.core.spec import DataSpec, preset_of
from defi_nb.data.episodes import WindowDataset, fake_frames
from defi_nb.data.mixtures import MIXTURES, TABLE_12, Mixture
from defi_nb.eval.published import ROWS, ablation_markdown, published
from defi_nb.models.action_adapter import ActionAdapter, AdapterConfig
from defi_nb.models.gfdm import GFDMConfig
from defi_nb.models.gidm import GIDM, GIDMConfig
from defi_nb.models.policy import PlainConfig, PolicyConfig
from defi_nb.train.config import TrainConfig
from defi_nb.weights.checkpoint import _preset_name as preset_name

ROWS_OF = [(t, name) for t in printed_tables() for name in t.rows]


@pytest.mark.parametrize("table,name", ROWS_OF, ids=[f"{t.source}-{name}" for t, name in ROWS_OF])
def test_row_adds_up_or_is_marked(table, name):
    *cells, last = table.rows[name]
    marks = "; ".join(row_marks(table, name))
    if table.kind == "chains":
        off = round(abs(sum(cells)/100 - last), 6) > .005
        assert off == (f"add up to {sum(cells)/100:.3f}" in marks)
        assert (np.gcd.reduce([round(10*c) for c in cells] + [1000]) % 8 == 0) == ("125 chains" in marks)
    if table.kind == "percent":
        for k, column in enumerate(table.columns):
            if "average" not in column: continue
            first = max((i + 1 for i in range(k) if "average" in table.columns[i]), default=0)
            mean = np.mean(table.rows[name][first:k])
            assert (round(abs(mean - table.rows[name][k]), 6) > .05) == (f"of its tasks is {mean:.1f}" in marks)


def test_slips_of_the_papers_are_the_known_ones():
    slips = {(t.source, name) for t, name in ROWS_OF if "add" in (m := "".join(row_marks(t, name))) or "mean" in m or "24)" in m}
    chains = {("DeFI, table 1", "pi0.5"), ("DeFI, table 5", "both without human video"), ("DeFI, table 8", "Gaussian mixture (G.M.)"),
              ("DeFI, table 8", "simple binning (S.B.)"), ("DeFI, table 8", "continuous latent action (C.L.A.)"), ("DeFI, table 9", "adapter only"),
              ("DeFI, figure 7", "0.0 of the human video"), ("IDL, table 1", "FLOWER")}
    percent = {("DeFI, table 2", "Octo-Base"), ("DeFI, table 2", "TraceVLA"), ("DeFI, table 2", "OpenVLA"), ("DeFI, table 3", "Diffusion Policy"),
               ("IDL, table 2", "OpenVLA"), ("IDL, table 2", "RoboVLMs (fine-tuned)"), ("IDL, table 2", "SpatialVLA (pre-trained)"),
               ("IDL, table 2", "SpatialVLA (fine-tuned)")}
    assert slips == chains | percent
    assert sum("125 chains" in "".join(row_marks(t, name)) for t, name in ROWS_OF) == 9


def test_everything_that_is_printed_is_there():
    assert len(printed_tables()) == 27 and len(ROWS_OF) == 244
    full = [t.rows[name] for t, name in ROWS_OF if t.paper == "DeFI" and t.kind == "chains" and t.rows[name][-1] == 4.51]
    assert len(full) == 8 and len(set(full)) == 1 # the full model is the same wherever it is repeated
    assert all(len(cells) == len(t.columns) for t in printed_tables() for cells in t.rows.values())
    assert all(t.rows and name in printed_markdown(t) for t, name in ROWS_OF)


def test_no_number_of_the_paper_is_unknown():
    "Every row of ours that stands in a table of the paper has its five rates, and shows what is amiss with them."
    assert all(len(printed_table("DeFI", row.tables[0]).rows[row.printed]) == 6 for row in ROWS if row.tables)
    cell = dict(data_frac=1., average_length=1., interval=(None, None), task_success=.1, seeds=[1.], chains=1, image_tasks=[])
    text = ablation_markdown([cell | dict(row=row.name, paper=row.paper) for row in ROWS])
    assert "not known" not in text and "4.16 (from 125 chains" in text and "4.33 (its rates add up to 4.315)" in text
    assert {p.average for p in published("ABC_D") if "DeFI, table 1" in p.source} == {row[-1] for row in printed_table("DeFI", 1).rows.values()}


def test_printed_shares_have_the_release_s_names():
    assert set(MIXTURES["paper_table_12"]) == set(TABLE_12)
    assert MIXTURES["paper_table_12"]["ego4d"] == pytest.approx(3.5/99.9)


def size(model): return sum(p.numel() for p in model.parameters())


def test_printed_models_have_the_printed_sizes():
    "Table 10, on the meta device."
    table = printed_table("DeFI", 10)
    gidm, adapter = GIDMConfig.printed(), AdapterConfig.printed()
    value = lambda name: table.row(name)["value"]
    assert (gidm.codes, gidm.enc_blocks, gidm.dim) == tuple(map(value, ("GIDM: vocabulary size of VQ codebook", "GIDM: number of layers", "GIDM: feature dimension")))
    assert (adapter.enc_blocks + adapter.dec_blocks, adapter.dim, adapter.steps, adapter.action_dim) == tuple(
        value(f"action adapter: {n}") for n in ("number of layers", "feature dimension", "sampling steps", "action dimension"))
    with torch.device("meta"): sizes = size(ActionAdapter(adapter)), size(GIDM(gidm)), size(ActionAdapter(AdapterConfig.paper()))
    assert 29e6 < sizes[0] < 33e6 and sizes[2] < 22e6 # the text has 30 M; the release about 22
    assert sizes[1] > 260e6 and len(PolicyConfig.printed().frames) == value("GFDM: predicted future frames")
    for stage, epochs in (("gfdm", "pretraining"), ("gidm", "pretraining"), ("policy", "fine-tuning")):
        recipe = TrainConfig.preset("printed", stage)
        printed = [value(f"training: {n}") for n in ("learning rate", "weight decay", "batch size", f"{epochs} epochs")]
        assert [recipe.lr, recipe.weight_decay, recipe.batch_size, recipe.epochs] == printed


def test_presets_are_told_apart():
    "Where the print is silent, the release's; every difference is one that docs/guides/fidelity.md lists."
    text = (ROOT/"docs/guides/fidelity.md").read_text()
    for config in (DataSpec, GFDMConfig, GIDMConfig, AdapterConfig):
        printed, release = asdict(preset_of(config, "printed")), asdict(preset_of(config, "paper"))
        differ = [n for n in printed if printed[n] != release[n]]
        assert differ and not [n for n in differ if f"`{config.__name__}.{n}`" not in text]
        assert preset_name(preset_of(config, "printed")) == "printed"
    assert preset_of(PlainConfig, "printed").adapter.dec_blocks == 6


def test_epochs_become_steps():
    "An epoch of a mixture is as many samples as its largest dataset has, whatever is drawn in all."
    cfg = TrainConfig(epochs=2, batch_size=32)
    assert cfg.over(range(64)).steps == 4 and cfg.over(range(65)).steps == 5 and cfg.over(range(64)).epochs == 0
    store = fake_frames({"open_drawer": 3})
    frames = WindowDataset(store, store.windows, chunk=2)
    mixture = Mixture(dict(a=frames, b=frames), dict(a=1, b=3), draws=1000)
    assert mixture.epoch == len(frames) and cfg.over(mixture) == cfg.over(frames)
