"""What post-training did, from records whose every number is known."""

import shutil

import pandas as pd
import pytest

from benchmarks.report import write_report
from tests.sweeps import Sweep

SMALL = {
    "seeds": [0, 1],
    "datasets": ["fashion_mnist"],
    "backbones": ["wrn_10_1"],
    "methods": ["sam", "sam+pof", "sam+longer"],
    "continued": {"longer": {"learning_rate": 0.02, "epochs": 70}},
}


def post_training(folder):
    write_report(folder)
    return pd.read_csv(folder / "post-training.csv").set_index("method")


def test_terms_course_and_outcome_of_every_arm(tmp_path):
    sweep = Sweep(tmp_path, SMALL | {"data": {"train_size": 1000}})
    for run in sweep.plan.runs:
        if run.settings.pof is not None:
            seed = run.settings.seed
            metrics = {201: {"xi_median": 0.2 + seed, "cosine": 0.1}, 250: {"xi_median": None}}
            sweep.finish(
                run,
                4.0,
                records=metrics,
                runaway=seed == 1,
                capped_share=0.5 * seed,
                train_loss=0.4,
            )
        else:
            sweep.finish(run, 5.0, train_loss=0.25 if run.parent is None else 0.125)
    for seed, ratio in ((0, 0.5), (1, 0.125)):
        sweep.measure_hessian(sweep.final("sam", seed), 8.0)
        sweep.measure_hessian(sweep.final("sam+pof", seed), 8.0 * ratio)
    found = post_training(sweep.folder)
    assert list(found.index) == ["sam+pof", "sam+longer"]
    pof, longer = found.loc["sam+pof"], found.loc["sam+longer"]
    # ⌈1000 / 256⌉ = 4 steps an epoch at the made-up rate of 0.1, for 50 and 70 epochs.
    assert pof.rate_steps == pytest.approx(4 * 50 * 0.1)
    assert longer.rate_steps == pytest.approx(4 * 70 * 0.1)
    assert (pof.loss_before, pof.loss_after) == (0.25, 0.4)
    assert (longer.loss_before, longer.loss_after) == (0.25, 0.125)
    assert pof.eigenvalue_ratio == pytest.approx(0.25)  # the geometric mean of 1/2 and 1/8
    assert pof.xi_first == pytest.approx((0.2 + 1.2) / 2)
    assert pd.isna(pof.xi_last)  # every batch was capped
    assert (pof.cosine_first, pof.cosine_last) == (0.1, 0.3)
    assert (pof.capped, pof.ran_away, pof.n) == (0.25, 1, 2)
    assert longer[["eigenvalue_ratio", "xi_first", "cosine_last", "capped"]].isna().all()
    assert longer.ran_away == 0
    page = (sweep.folder / "README.md").read_text()
    assert "−1.00 ± 0.00" in page.split("## What post-training did")[1].split("SAM+longer")[0]
    assert "What post-training did" in (sweep.folder / "report.html").read_text()


def test_of_a_whole_data_set_the_records_do_not_hold_the_steps(tmp_path):
    sweep = Sweep(tmp_path, SMALL)
    sweep.finish_all(lambda run: 5.0)
    assert post_training(sweep.folder).rate_steps.isna().all()


def test_a_parent_whose_record_is_gone_leaves_a_gap_and_no_more(tmp_path):
    sweep = Sweep(tmp_path, SMALL | {"data": {"train_size": 1000}, "seeds": [0]})
    sweep.finish_all(lambda run: 5.0)
    shutil.rmtree(sweep.store.folder(sweep.plan.runs[0]).path)
    assert post_training(sweep.folder).loss_before.isna().all()


def test_without_post_training_there_is_no_such_table(tmp_path):
    sweep = Sweep(tmp_path, SMALL | {"methods": ["sam"]})
    sweep.finish_all(lambda run: 5.0)
    write_report(sweep.folder)
    assert not (sweep.folder / "post-training.csv").exists()
    assert "What post-training did" not in (sweep.folder / "README.md").read_text()
