import pytest
import torch

from pof.hessian import spectral_density, trace


def matrix(n=50, seed=0):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(n, n, generator=generator, dtype=torch.float64)
    return A + A.T + torch.diag(torch.linspace(0, 40, n, dtype=torch.float64))


def test_trace_is_unbiased_and_its_error_bar_covers():
    H = matrix()
    exact = float(H.trace())
    estimates = [trace(H, probes=20, seed=seed) for seed in range(200)]
    misses = [(e.value - exact) / e.standard_error for e in estimates]
    # 95% of a t distribution with 19 degrees of freedom lies within ±2.093.
    covered = sum(abs(z) < 2.093 for z in misses) / len(misses)
    assert 0.9 <= covered <= 0.99
    means = torch.tensor([e.value for e in estimates])
    assert float(means.mean()) == pytest.approx(exact, abs=3 * float(means.std()) / 200**0.5)


def test_trace_of_a_diagonal_matrix_has_no_error():
    estimate = trace(torch.diag(torch.arange(5.0)), probes=3)
    assert estimate.value == 10.0
    assert estimate.standard_error == 0.0


def test_standard_error_is_of_the_mean():
    estimate = trace(matrix(), probes=16, seed=3)
    assert estimate.value == pytest.approx(float(estimate.probes.mean()))
    assert estimate.standard_error == pytest.approx(float(estimate.probes.std(correction=1)) / 4)
    assert torch.equal(estimate.probes, trace(matrix(), probes=16, seed=3).probes)
    assert not torch.equal(estimate.probes, trace(matrix(), probes=16, seed=4).probes)


def test_one_probe_is_too_few():
    with pytest.raises(ValueError, match="at least 2"):
        trace(torch.eye(2), probes=1)


def test_density_matches_the_moments_of_the_spectrum():
    H = matrix(200)
    exact = torch.linalg.eigvalsh(H)
    found = spectral_density(H, steps=20, runs=40)
    assert float(found.weights.sum()) == pytest.approx(1.0)
    assert bool((found.weights >= 0).all())
    for power in (1, 2, 3):
        ours = float(found.weights @ found.nodes**power)
        assert ours == pytest.approx(float((exact**power).mean()), rel=0.05)
    assert float(found.nodes.min()) == pytest.approx(float(exact.min()), rel=0.05)


def test_density_of_every_step_is_exact_in_the_moments_of_its_start():
    H = matrix(12)
    found = spectral_density(H, steps=12, runs=1, seed=5)
    start = (
        torch.randint(2, (12,), generator=torch.Generator().manual_seed(5)).double() * 2 - 1
    ) / 12**0.5
    for power in range(1, 6):
        expected = start @ torch.linalg.matrix_power(H, power) @ start
        assert float(found.weights @ found.nodes**power) == pytest.approx(float(expected))


def test_density_integrates_to_one_and_finds_the_clusters():
    spectrum = torch.cat([torch.zeros(90), torch.full((10,), 5.0)]).double()
    found = spectral_density(torch.diag(spectrum), runs=10)
    grid = torch.linspace(-3, 8, 2001, dtype=torch.float64)
    curve = found.density(grid, 0.2)
    step = float(grid[1] - grid[0])
    assert float(curve.sum()) * step == pytest.approx(1.0, abs=1e-6)
    assert float(curve[grid > 2.5].sum()) * step == pytest.approx(0.1, abs=1e-6)
    assert found.density(grid.view(3, -1), 0.2).shape == (3, 667)
