"""Curvature, conjugate gradient, step length and line search against dense linear algebra (P7), and the price of divergence (P8)."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from oracle import TOLERANCE, compiled
from scipy.optimize import minimize

from surefoot.distributions import Categorical, DiagonalGaussian
from surefoot.math.trust_region import (
    adaptive_step_size,
    backtracking_line_search,
    conjugate_gradient,
    curvature_product,
    dual_ascent,
    project_onto_half_space,
    trust_region_scale,
)

pytestmark = pytest.mark.x64

MDP = oracle.random_mdp(0)
BATCH = oracle.trajectories(MDP)
FEATURES = np.random.default_rng(0).normal(size=(5, 3))  # of five states
NODES, NODE_WEIGHTS = np.polynomial.hermite_e.hermegauss(5)  # exact for polynomials up to degree 9: squared scores have 4


def positive_definite(eigenvalues, seed=0):
    rng = np.random.default_rng(seed)
    rotation = np.linalg.qr(rng.normal(size=(len(eigenvalues),) * 2))[0]
    return (rotation * eigenvalues) @ rotation.T


# The Fisher matrix: one row of logits, or one mean and one log standard deviation, for each of five states.


def categorical(parameters):
    return Categorical.from_logits(FEATURES @ parameters.reshape(3, 4))


def categorical_fisher(parameters):
    """E[score score^T], the expectation a sum over all actions and a mean over the states."""
    probs = jnp.exp(categorical(parameters).log_probs)
    score = jax.jacobian(lambda parameters: categorical(parameters).log_probs)(parameters)  # [S, A, D]
    return jnp.einsum("sa,sad,sae->de", probs, score, score) / len(FEATURES)


def gaussian(parameters):
    """Two actions; the spread depends on the state too, so that the two directions of the KL are far apart away from the point."""
    return DiagonalGaussian(FEATURES @ parameters[:6].reshape(3, 2), FEATURES @ parameters[6:].reshape(3, 2) / 4)


def gaussian_fisher(parameters):
    """E[score score^T], the expectation a quadrature over actions and a mean over the states."""
    at = gaussian(parameters)
    noise = jnp.stack(jnp.meshgrid(NODES, NODES, indexing="ij"), axis=-1).reshape(-1, 1, 2)
    weight = np.outer(NODE_WEIGHTS, NODE_WEIGHTS).ravel() / NODE_WEIGHTS.sum() ** 2
    action = at.mean + jnp.exp(at.log_std) * noise
    score = jax.jacobian(lambda parameters: jax.vmap(gaussian(parameters).log_prob)(action))(parameters)  # [25, S, D]
    return jnp.einsum("q,qsd,qse->de", weight, score, score) / len(FEATURES)


@pytest.mark.parametrize("direction", ["old||new", "new||old"])
@pytest.mark.parametrize(("policy", "fisher"), [(categorical, categorical_fisher), (gaussian, gaussian_fisher)])
def test_curvature_of_either_kl_at_the_old_policy_is_the_fisher_matrix(policy, fisher, direction):
    point, vector = np.random.default_rng(1).normal(size=(2, 12))
    old = policy(point)

    def mean_kl(parameters):
        new = policy(parameters)
        return jnp.mean(old.kl_to(new) if direction == "old||new" else new.kl_to(old))

    def metric(tangent):
        return jax.tree.map(lambda x: x / len(FEATURES), old.fisher_metric(tangent))

    product = compiled(lambda point, vector: curvature_product(policy, point, metric)(vector), point, vector)
    np.testing.assert_allclose(product, compiled(fisher, point) @ vector, **TOLERANCE)
    np.testing.assert_allclose(product, compiled(jax.hessian(mean_kl), point) @ vector, **TOLERANCE)
    elsewhere = compiled(jax.hessian(mean_kl), point + vector) @ vector
    assert np.max(np.abs(elsewhere - product)) > 0.01  # away from the old policy it is no Fisher matrix


def test_curvature_of_the_expected_kl_is_the_expected_fisher_matrix_of_the_trajectories():
    """Over every trajectory of the oracle: the mean over steps of score score^T."""
    theta, vector = oracle.random_logits(MDP, 1), np.random.default_rng(2).normal(size=MDP.reward.shape[0] * MDP.reward.shape[1])
    score = compiled(jax.jacobian(lambda theta: oracle.log_prob(theta, BATCH)), theta).reshape(*BATCH.valid.shape, -1)
    prob = oracle.probability(theta, BATCH)
    fisher = np.einsum("n,tnd,tne->de", prob, score, score) / np.sum(prob * BATCH.valid)

    def policies(flat):
        return Categorical.from_logits(flat.reshape(theta.shape))

    def metric(tangent):
        weighed = policies(theta.ravel()).fisher_metric(tangent)
        return Categorical(visits[:, None] * weighed.log_probs)

    visits = np.zeros(len(theta))
    np.add.at(visits, BATCH.state, prob * BATCH.valid)
    visits /= np.sum(prob * BATCH.valid)
    product = compiled(lambda point, vector: curvature_product(policies, point, metric)(vector), theta.ravel(), vector)
    np.testing.assert_allclose(product, fisher @ vector, **TOLERANCE)


# Conjugate gradient


def solve(matrix, target, **options):
    return compiled(lambda matrix, target: conjugate_gradient(lambda v: matrix @ v, target, **options), matrix, target)


@pytest.mark.parametrize("eigenvalues", [np.linspace(1, 2, 8), np.logspace(-3, 3, 8)], ids=["well conditioned", "ill conditioned"])
def test_conjugate_gradient_solves(eigenvalues):
    matrix, target = positive_definite(eigenvalues), np.random.default_rng(1).normal(size=8)
    x = solve(matrix, target, num_iterations=60, tolerance=1e-26)
    np.testing.assert_allclose(x, np.linalg.solve(matrix, target), rtol=1e-7)


def test_as_many_iterations_as_eigenvalues_are_enough():
    matrix, target = positive_definite(np.array([1.0, 1.0, 1.0, 5.0, 5.0, 9.0])), np.random.default_rng(1).normal(size=6)
    np.testing.assert_allclose(solve(matrix, target, num_iterations=3, tolerance=0.0), np.linalg.solve(matrix, target), **TOLERANCE)
    assert np.max(np.abs(solve(matrix, target, num_iterations=2, tolerance=0.0) - np.linalg.solve(matrix, target))) > 1e-3


def test_the_first_iteration_is_the_best_step_along_the_target():
    matrix, target = positive_definite(np.linspace(1, 9, 6)), np.random.default_rng(1).normal(size=6)
    length = target @ target / (target @ matrix @ target)
    np.testing.assert_allclose(solve(matrix, target, num_iterations=1), length * target, **TOLERANCE)


def test_it_stops_once_the_squared_residual_is_a_small_part_of_the_first():
    matrix, target = positive_definite(np.logspace(0, 3, 12)), 1e3 * np.random.default_rng(1).normal(size=12)
    part = [
        np.sum((target - matrix @ solve(matrix, target, num_iterations=40, tolerance=tolerance)) ** 2) / np.sum(target**2)
        for tolerance in (0.5, 1e-3, 1e-10)
    ]
    assert 1e-3 < part[0] <= 0.5
    assert 1e-10 < part[1] <= 1e-3
    assert part[2] <= 1e-10


def test_no_target_gives_no_direction():
    np.testing.assert_array_equal(solve(positive_definite(np.ones(4)), np.zeros(4), num_iterations=5), 0.0)


# Length of the step


def test_the_step_ends_on_the_edge_of_the_region():
    matrix, direction = positive_definite(np.logspace(-2, 2, 6)), np.random.default_rng(1).normal(size=6)
    step = direction * compiled(trust_region_scale, direction, matrix @ direction, max_divergence=0.01)
    np.testing.assert_allclose(0.5 * step @ matrix @ step, 0.01, **TOLERANCE)
    assert step @ direction > 0


@pytest.mark.parametrize("curvature", [0.0, -1.0])
def test_a_direction_without_length_is_not_followed(curvature):
    scale, slope = jax.value_and_grad(lambda x: trust_region_scale(x, curvature * x, max_divergence=0.01))(jnp.ones(3))
    np.testing.assert_array_equal(scale, 0.0)
    assert np.isfinite(slope).all()


# Projection


def test_the_projection_is_the_nearest_vector_within_the_bound():
    """Against a general solver of quadratic programs, row by row; the bound holds for some and lets others be."""
    rng = np.random.default_rng(0)
    vectors, normals = rng.normal(size=(2, 6, 2, 4))
    found = compiled(project_onto_half_space, vectors, normals, bound=0.7)
    binds = np.sum(vectors * normals, axis=-1) > 0.7
    assert 0.2 < np.mean(binds) < 0.8
    for row in np.ndindex(6, 2):
        g, k = vectors[row], normals[row]
        within = {"type": "ineq", "fun": lambda z, k=k: 0.7 - k @ z, "jac": lambda z, k=k: -k}
        best = minimize(lambda z, g=g: 0.5 * np.sum((z - g) ** 2), np.zeros(4), jac=lambda z, g=g: z - g, constraints=within, tol=1e-14)
        np.testing.assert_allclose(found[row], best.x, atol=1e-7)
    np.testing.assert_allclose(np.sum(found * normals, axis=-1)[binds], 0.7, **TOLERANCE)
    np.testing.assert_array_equal(found[~binds], vectors[~binds])


@pytest.mark.parametrize(
    ("bound", "expected"), [(0.0, [0.0, 3.0]), (1.0, [0.5, 3.0]), (10.0, [5.0, 3.0]), (11.0, [5.0, 3.0]), (np.inf, [5.0, 3.0])]
)
def test_the_projection_by_hand(bound, expected):
    np.testing.assert_array_equal(project_onto_half_space(jnp.array([5.0, 3.0]), jnp.array([2.0, 0.0]), bound=bound), expected)


@pytest.mark.parametrize("bound", [0.0, 1.0, np.inf])
def test_a_normal_without_length_holds_nothing_back(bound):
    np.testing.assert_array_equal(project_onto_half_space(jnp.ones((2, 3)), jnp.zeros((2, 3)), bound=bound), 1.0)


# Line search


@pytest.mark.parametrize(
    ("largest", "scale", "tries"),
    [(2.0, 1.0, 1), (1.0, 1.0, 1), (0.99, 0.8, 2), (0.65, 0.64, 3), (0.8**4, 0.8**4, 5), (0.8**5, 0.0, 5), (0.0, 0.0, 5)],
)
def test_line_search_takes_the_first_acceptable_try(largest, scale, tries):
    def search(largest):
        return backtracking_line_search(lambda scale: scale <= largest * (1 + 1e-12), factor=0.8, num_tries=5, dtype=jnp.float64)

    found = compiled(search, largest)
    np.testing.assert_allclose(found, [scale, tries], **TOLERANCE)


def test_line_search_does_not_look_past_the_first_acceptable_try():
    """Acceptable are a half and less than a tenth: the half comes first, though the search could go on."""
    scale, tries = backtracking_line_search(lambda scale: (scale == 0.5) | (scale < 0.1), factor=0.5, num_tries=9)
    assert (scale, tries) == (0.5, 2)


def test_what_is_not_a_number_is_not_acceptable():
    scale, tries = backtracking_line_search(lambda scale: scale * jnp.nan <= 1.0, factor=0.5, num_tries=3)
    assert (scale, tries) == (0.0, 3)


@pytest.mark.parametrize(
    ("kl", "expected"),
    [(0.0, 4.5), (0.99e-3, 4.5), (1.01e-3, 3.0), (2e-3, 3.0), (3.99e-3, 3.0), (4.01e-3, 2.0), (9.0, 2.0), (np.inf, 2.0), (np.nan, 3.0)],
)
def test_the_step_size_falls_beyond_two_targets_and_rises_within_half_of_one(kl, expected):
    assert adaptive_step_size(3.0, kl, target=2e-3) == expected


def test_the_step_size_follows_factor_and_tolerance():
    assert adaptive_step_size(3.0, 0.016, target=0.01, factor=3.0, tolerance=1.5) == 1.0
    assert adaptive_step_size(3.0, 0.014, target=0.01, factor=3.0, tolerance=1.5) == 3.0
    assert adaptive_step_size(3.0, 0.006, target=0.01, factor=3.0, tolerance=1.5) == 9.0


# The price of the divergence


@pytest.mark.parametrize(
    ("divergence", "expected"), [(0.01, 2.0), (0.03, 3.0), (0.0, 1.5), (-1.0, 0.0), (-0.03, 0.0), (-0.029, 0.05), (np.inf, np.inf)]
)
def test_the_multiplier_rises_beyond_the_bound_falls_within_it_and_is_never_negative(divergence, expected):
    after = compiled(dual_ascent, jnp.asarray(2.0), jnp.asarray(divergence), max_divergence=0.01, step_size=50.0)
    np.testing.assert_allclose(after, expected, **TOLERANCE)


def test_the_multiplier_climbs_the_dual():
    """Maximising g x under x^2 / 2 <= b: the dual is g^2 / (2 m) + m b, least at m = g / sqrt(2 b), where the bound is met."""
    g, b = 0.3, 0.01

    def dual(m):
        return g**2 / (2 * m) + m * b

    for m in (0.5, 2.0, 4.0):
        maximiser = g / m
        np.testing.assert_allclose(dual_ascent(m, maximiser**2 / 2, max_divergence=b, step_size=1.0), m - jax.grad(dual)(m), **TOLERANCE)
    m = 0.5
    for _ in range(200):
        m = dual_ascent(m, (g / m) ** 2 / 2, max_divergence=b, step_size=20.0)
    np.testing.assert_allclose(m, g / np.sqrt(2 * b), **TOLERANCE)
