"""Published numbers and claims: complete, sourced, and refused with a clear line when broken."""

import math

import pytest
from pydantic import ValidationError

from benchmarks.errors import UserError
from benchmarks.reference import Claim, claim, claims, pof_paper, poster_background, sam_paper
from benchmarks.settings import load_profile


def test_the_sam_papers_table_is_whole():
    paper = sam_paper()
    assert paper.n == 5
    assert "95% confidence" in paper.plus_minus
    assert len(paper.error) == 16
    assert str(paper.find("cifar10", "wrn_28_10", "autoaugment", "sam")) == "2.1 ± <0.1"
    assert str(paper.find("cifar100", "wrn_28_10", "cutout", "sgd")) == "16.9 ± 0.1"
    long = [row for row in paper.error if row.epochs == 1800]
    assert sorted(row.errors["sam"].mean for row in long) == [1.6, 2.1, 2.4, 12.8, 14.0, 16.3]
    # A number of another length of training never stands for the main setting's.
    assert paper.find("cifar10", "wrn_28_10", "basic", "sam").mean == 2.7
    for row in paper.error:
        assert row.errors["sam"].mean < row.errors["sgd"].mean


def test_the_posters_table_has_a_row_without_an_interval():
    table = poster_background()
    numbers = {row.dataset: row.errors for row in table.error}
    assert len(numbers) == 9
    assert str(numbers["ImageNet"]["base"]) == "15.3"
    assert str(numbers["Flowers"]["sam"]) == "0.63 ± 0.02"


def test_the_pof_papers_cells_are_empty_and_a_note_says_how_to_fill_them():
    table = pof_paper()
    paper = load_profile("paper")
    cells = {(row.dataset, row.augmentation) for row in table.error}
    assert cells == {(d, a) for d in paper.datasets for a in paper.augmentations}
    assert all(not row.errors for row in table.error)
    assert "empty" in table.note
    assert table.find("cifar10", "wrn_28_10", "basic", "sam+pof") is None


def test_every_claim_says_what_is_compared_its_source_and_its_margin():
    assert [c.id for c in claims()] == [
        "error",
        "early",
        "hessian",
        "hessian-direction",
        "range",
        "sgd",
        "sam",
    ]
    for found in claims():
        assert found.source
        assert found.plus_minus
        assert all(expectation.why_margin for expectation in found.expect)


def test_what_the_claims_allow():
    error = claim("error")
    assert error.bounds(error.expectation("svhn")) == (-math.inf, 0.0)
    assert error.bounds(error.expectation("fashion_mnist")) == (-0.05, math.inf)
    assert error.expectation("digits") is None
    halved, twice = claim("hessian"), claim("range")
    assert halved.bounds(halved.expectation("digits")) == pytest.approx((0.4, 0.625))
    assert twice.bounds(twice.expectation("svhn")) == pytest.approx((1.6, 2.5))
    assert [claim("early").expectation(d).epochs for d in ("cifar10", "svhn")] == [10, 50]


def test_an_unknown_claim_is_one_line_with_those_that_there_are():
    with pytest.raises(UserError, match="no claim 'curvature'; there are: error, early, hessian"):
        claim("curvature")


@pytest.mark.parametrize(
    ("comparison", "direction", "margin", "said"),
    [
        ("ratio", "lower", 0.5, "at least 1"),
        ("difference", "lower", -0.1, "at least 0"),
        ("ratio", "about", 1.0, "needs a margin"),
    ],
)
def test_a_margin_that_makes_no_sense_is_refused(comparison, direction, margin, said):
    content = {
        "id": "x",
        "statement": "",
        "source": "",
        "plus_minus": "",
        "quantity": "test_error",
        "comparison": comparison,
        "treated": "sam+pof",
        "base": "sam",
        "expect": [{"direction": direction, "value": 1.0, "margin": margin, "why_margin": ""}],
    }
    with pytest.raises(ValidationError, match=said):
        Claim.model_validate(content)
