import math

import pytest
import torch
from scipy.sparse.linalg import LinearOperator, eigsh

from pof.hessian import Eigen, extreme_eigenvalues, top_eigenvalues


def symmetric(values, seed=0, dtype=torch.float64):
    """A matrix of these eigenvalues in a random basis."""
    values = torch.as_tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    n = len(values)
    Q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    matrix = Q @ torch.diag(values) @ Q.T
    return (0.5 * (matrix + matrix.T)).to(dtype)


def random_spectrum(seed, n=60):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=generator, dtype=torch.float64) * torch.rand(
        n, generator=generator, dtype=torch.float64
    )


class Counted:
    """A matrix that can be multiplied with and nothing else."""

    def __init__(self, matrix):
        self.matrix = matrix
        self.shape = tuple(matrix.shape)
        self.dtype = matrix.dtype
        self.device = matrix.device
        self.products = 0

    def __matmul__(self, vector):
        self.products += 1
        return self.matrix @ vector


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("solver", ["dense", "lanczos"])
def test_random_matrices(seed, solver):
    spectrum = random_spectrum(seed).sort().values
    top, bottom = extreme_eigenvalues(
        symmetric(spectrum, seed), largest=3, smallest=2, solver=solver, tolerance=1e-9
    )
    assert top.all_converged
    assert bottom.all_converged
    torch.testing.assert_close(top.values, spectrum.flip(0)[:3], rtol=1e-12, atol=0)
    torch.testing.assert_close(bottom.values, spectrum[:2], rtol=1e-12, atol=0)
    assert top.vectors.shape == (60, 3)
    gram = top.vectors.T @ top.vectors
    torch.testing.assert_close(gram, torch.eye(3, dtype=torch.float64), atol=1e-10, rtol=0)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("iterations", [2, 5, 9])
def test_the_residual_bounds_the_error_however_short_the_solver_is_cut(seed, iterations):
    spectrum = random_spectrum(seed)
    matrix = symmetric(spectrum, seed)
    top = top_eigenvalues(matrix, max_iterations=iterations, solver="lanczos", seed=seed)
    assert top.iterations == iterations
    v = top.vectors[:, 0]
    independent = torch.linalg.vector_norm(matrix @ v - top.values[0] * v)
    assert float(top.residual_norms[0]) == pytest.approx(float(independent), rel=1e-6)
    assert float(top.residuals[0]) == pytest.approx(float(independent / top.values[0].abs()))
    assert float((spectrum - top.values[0]).abs().min()) <= float(independent) * (1 + 1e-9)


def test_cut_short_is_not_converged():
    matrix = symmetric(torch.linspace(1.0, 2.0, 300))
    top = top_eigenvalues(matrix, 2, max_iterations=10, solver="lanczos")
    assert not top.converged.any()
    assert not top.all_converged
    assert top.record()["converged"] == [False, False]
    assert top_eigenvalues(matrix, 2, solver="lanczos").all_converged


def test_signed_not_magnitude():
    spectrum = torch.cat([torch.tensor([-50.0, -7.0]), torch.linspace(0, 1, 40), torch.tensor([3])])
    for solver in ("dense", "lanczos"):
        top, bottom = extreme_eigenvalues(symmetric(spectrum), largest=1, smallest=2, solver=solver)
        assert float(top.values[0]) == pytest.approx(3.0)
        assert bottom.values.tolist() == pytest.approx([-50.0, -7.0])
    negative = top_eigenvalues(symmetric(-torch.linspace(1, 5, 30)), 2, solver="lanczos")
    assert negative.values.tolist() == pytest.approx([-1.0, -1 - 4 / 29])


def test_restarts_reach_what_one_long_run_does():
    n = 400
    spectrum = torch.linspace(0.0, 1.0, n) ** 2
    matrix = Counted(symmetric(spectrum))
    kwargs = {"largest": 3, "smallest": 0, "tolerance": 1e-9, "max_iterations": 2000}
    short, _ = extreme_eigenvalues(matrix, **kwargs, max_basis=20)
    long, _ = extreme_eigenvalues(matrix, **kwargs, max_basis=400)
    assert short.iterations > 20
    for found in (short, long):
        assert found.all_converged
        torch.testing.assert_close(found.values, spectrum.flip(0)[:3].double())
    assert long.iterations <= short.iterations < 4 * long.iterations


def test_against_arpack():
    matrix = symmetric(random_spectrum(3, 200)).numpy()
    theirs = eigsh(
        LinearOperator(matrix.shape, matvec=lambda v: matrix @ v, dtype=matrix.dtype),
        k=5,
        which="LA",
        return_eigenvectors=False,
    )
    ours = top_eigenvalues(torch.from_numpy(matrix), 5, solver="lanczos").values
    torch.testing.assert_close(ours, torch.from_numpy(theirs.copy()).flip(0), rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("spectrum", "k"),
    [
        ([5.0, 5.0, 3.0, 2.0, 1.0], 2),
        ([5.0, 5.0, 5.0] + [1.0] * 40, 3),
        ([2.0] * 12, 4),
        ([0.0] * 30, 2),
        ([1.0], 1),
        ([4.0] + [0.0] * 30, 2),
    ],
)
def test_repeated_eigenvalues(spectrum, k):
    top = top_eigenvalues(symmetric(spectrum), k, solver="lanczos")
    expected = torch.tensor(spectrum, dtype=torch.float64).sort(descending=True).values[:k]
    torch.testing.assert_close(top.values, expected, rtol=1e-10, atol=1e-12)
    assert top.all_converged


def test_an_eigenvalue_that_is_zero_has_no_relative_residual():
    spectrum = torch.cat([torch.zeros(20), torch.linspace(1, 2, 20)])
    _, bottom = extreme_eigenvalues(symmetric(spectrum), largest=0, smallest=1, solver="lanczos")
    assert abs(float(bottom.values[0])) < 1e-14
    assert bottom.all_converged
    # Small beside the norm is not zero.
    eigen = Eigen(
        torch.tensor([1e-6], dtype=torch.float64),
        torch.ones(1, 1, dtype=torch.float64),
        torch.tensor([1e-9], dtype=torch.float64),
        tolerance=1e-6,
        iterations=1,
        seed=0,
        solver="lanczos",
        norm=1.0,
    )
    assert not eigen.all_converged


def test_not_a_number_is_not_converged():
    eigen = Eigen(
        torch.tensor([math.nan], dtype=torch.float64),
        torch.ones(1, 1, dtype=torch.float64),
        torch.tensor([math.nan], dtype=torch.float64),
        tolerance=1e-6,
        iterations=1,
        seed=0,
        solver="lanczos",
        norm=math.nan,
    )
    assert not eigen.all_converged


def test_float32_operators_say_how_far_they_get():
    spectrum = random_spectrum(1)
    top = top_eigenvalues(
        symmetric(spectrum, dtype=torch.float32), tolerance=1e-4, solver="lanczos"
    )
    assert top.vectors.dtype == torch.float32
    assert top.all_converged
    assert float(top.values[0]) == pytest.approx(float(spectrum.max()), rel=1e-5)
    hopeless = top_eigenvalues(
        symmetric(spectrum, dtype=torch.float32), tolerance=1e-12, solver="lanczos"
    )
    assert not hopeless.all_converged
    assert float(hopeless.residuals[0]) < 1e-5


def test_the_seed_decides_and_no_global_does():
    matrix = Counted(symmetric(random_spectrum(0)))
    torch.manual_seed(1)
    first = top_eigenvalues(matrix, seed=4)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = top_eigenvalues(matrix, seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.vectors, second.vectors)
    assert not torch.equal(first.vectors, top_eigenvalues(matrix, seed=5).vectors)
    assert first.record()["seed"] == 4


def test_a_good_start_saves_products():
    matrix = symmetric(torch.linspace(0, 1, 200))
    cold = Counted(matrix)
    found = top_eigenvalues(cold, tolerance=1e-8)
    warm = Counted(matrix)
    again = top_eigenvalues(
        warm, tolerance=1e-8, start=found.vectors[:, 0] + 1e-5 * torch.ones(200)
    )
    assert again.seed is None
    assert warm.products < cold.products
    assert float(again.values[0]) == pytest.approx(1.0)
    exact = top_eigenvalues(Counted(matrix), 2, start=torch.linalg.eigh(matrix)[1][:, -1])
    assert exact.values.tolist() == pytest.approx([1.0, 1 - 1 / 199])


def test_products_are_counted():
    matrix = Counted(symmetric(random_spectrum(0)))
    top = top_eigenvalues(matrix, 2)
    assert matrix.products == top.iterations


@pytest.mark.parametrize(("largest", "smallest"), [(0, 0), (4, 0), (2, 2), (-1, 2)])
def test_impossible_requests(largest, smallest):
    with pytest.raises(ValueError, match="cannot be had"):
        extreme_eigenvalues(torch.eye(3), largest=largest, smallest=smallest)


def test_not_square():
    with pytest.raises(ValueError, match="square"):
        top_eigenvalues(torch.ones(2, 3))
