"""A token stream of known entropy: a first-order Markov chain, for tests and for checking fits.

Shape suffixes: V states (the vocabulary), C parallel chains.
"""

import numpy as np

CONCENTRATION = 0.1
"""Dirichlet parameter of each row: small, so that a few successors carry most of the mass."""
NUM_CHAINS = 64
"""Chains drawn side by side and written one after the other."""


def transition_matrix(vocab_size: int, seed: int = 0) -> np.ndarray:
    """Row-stochastic float64 (V, V), rows drawn from a symmetric Dirichlet."""
    rng = np.random.Generator(np.random.Philox(key=seed))
    return rng.dirichlet(np.full(vocab_size, CONCENTRATION), size=vocab_size)


def stationary(matrix_VV: np.ndarray) -> np.ndarray:
    """The distribution that the chain keeps, float64 (V,)."""
    size = len(matrix_VV)
    system = np.vstack([matrix_VV.T - np.eye(size), np.ones(size)])
    target = np.append(np.zeros(size), 1.0)
    solution = np.linalg.lstsq(system, target, rcond=None)[0].clip(0.0)
    return solution / solution.sum()


def entropy_rate(matrix_VV: np.ndarray) -> float:
    """Nats per token that no model can beat: -sum_i pi_i sum_j p_ij ln p_ij (Shannon 1948)."""
    logs_VV = np.log(np.where(matrix_VV > 0, matrix_VV, 1.0))
    return float(-(stationary(matrix_VV) @ (matrix_VV * logs_VV)).sum())


def markov_chain(matrix_VV: np.ndarray, num_tokens: int, seed: int) -> np.ndarray:
    """int64 (num_tokens,): chains that start in the stationary distribution, end to end."""
    rng = np.random.Generator(np.random.Philox(key=seed))
    length = -(-num_tokens // NUM_CHAINS)
    cumulative_VV = matrix_VV.cumsum(axis=1)
    cumulative_VV /= cumulative_VV[:, -1:]
    states_C = rng.choice(len(matrix_VV), size=NUM_CHAINS, p=stationary(matrix_VV))
    chain_CT = np.empty((NUM_CHAINS, length), dtype=np.int64)
    for time, uniform_C in enumerate(rng.random((length, NUM_CHAINS))):
        chain_CT[:, time] = states_C
        states_C = (cumulative_VV[states_C] < uniform_C[:, None]).sum(axis=1)
    return chain_CT.reshape(-1)[:num_tokens]
