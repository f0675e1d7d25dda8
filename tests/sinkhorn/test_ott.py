"""OTT-JAX, where it is installed, on random problems: an independent implementation of the same definitions."""

import pytest
import torch
from helpers import DEVICE
from sinkhorn_problems import problem

from solera.sinkhorn import sinkhorn, sinkhorn_newton_sparse, sinkhorn_points

pytest.importorskip("ott")
import jax
import jax.numpy as jnp
from ott.geometry.geometry import Geometry
from ott.geometry.pointcloud import PointCloud
from ott.problems.linear.linear_problem import LinearProblem
from ott.solvers.linear.sinkhorn import Sinkhorn

pytestmark = [
    pytest.mark.no_interpreter,
    pytest.mark.skipif(DEVICE != "cpu", reason="OTT-JAX is compared on the CPU"),
]
F64 = torch.float64


@pytest.fixture(autouse=True)
def double():
    """jax in float64, for the test alone."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


def array(t):
    return jnp.asarray(t.detach().numpy())


def solve(geometry, a, b, rho=None):
    """(plan, <P, C>, KL-regularised cost) of OTT's solution to 1e-10, by the plan."""
    epsilon = float(geometry.epsilon)
    tau = 1.0 if rho is None else rho / (rho + epsilon)
    problem = LinearProblem(geometry, array(a), array(b), tau_a=tau, tau_b=tau)
    out = Sinkhorn(threshold=1e-10, max_iterations=20000)(problem)
    plan = torch.from_numpy(jax.device_get(out.matrix).copy())
    cost = torch.from_numpy(jax.device_get(geometry.cost_matrix).copy())
    transport = (plan * cost).sum()
    joint = a[:, None] * b
    return plan, transport, transport + epsilon * (plan * (plan / joint).log()).sum()


@pytest.mark.parametrize("n, m, epsilon", [(5, 7, 0.5), (40, 33, 0.1), (60, 60, 0.02)])
def test_dense_problems(n, m, epsilon):
    cost, a, b = problem(n, m, dtype=F64)
    plan, transport, value = solve(Geometry(array(cost), epsilon=epsilon), a, b)
    ours = sinkhorn(cost, a, b, epsilon=epsilon, max_iterations=20000, tolerance=1e-11)
    newton = sinkhorn_newton_sparse(cost, a, b, epsilon=epsilon)
    for r in (ours, newton):
        torch.testing.assert_close(r.plan(), plan, rtol=1e-6, atol=1e-11)
        torch.testing.assert_close(r.transport_cost(), transport, rtol=1e-8, atol=0)
        torch.testing.assert_close(r.cost, value, rtol=1e-8, atol=0)


@pytest.mark.parametrize("rho", [0.3, 2.0])
def test_unbalanced_problems(rho):
    """OTT's entropy is relative to the counting measure, ours to a x b: that is in the cost it is given."""
    epsilon = 0.1
    cost, a, b = problem(30, 25, dtype=F64)
    b = 1.5 * b
    relative = cost - epsilon * (a[:, None] * b).log()
    plan, *_ = solve(Geometry(array(relative), epsilon=epsilon), a, b, rho)
    r = sinkhorn(cost, a, b, epsilon=epsilon, rho=rho, max_iterations=20000, tolerance=1e-12)
    torch.testing.assert_close(r.plan(), plan, rtol=1e-6, atol=1e-11)


@pytest.mark.parametrize("d", [2, 12])
def test_points(d):
    torch.manual_seed(d)
    x, y = torch.rand(50, d, dtype=F64), torch.rand(44, d, dtype=F64)
    a, b = (torch.rand(k, dtype=F64) + 0.1 for k in (50, 44))
    a, b = a / a.sum(), b / b.sum()
    plan, transport, value = solve(PointCloud(array(x), array(y), epsilon=0.1), a, b)
    ours = sinkhorn_points(x, y, a, b, epsilon=0.1, max_iterations=20000, tolerance=1e-11)
    torch.testing.assert_close(ours.cost, value, rtol=1e-8, atol=0)
    torch.testing.assert_close(ours.transport_cost(), transport, rtol=1e-8, atol=0)
    torch.testing.assert_close(ours.apply(y), plan @ y, rtol=1e-7, atol=1e-11)
