"""Runs on isoFLOP curves whose minima are known."""

import numpy as np

from analysis.load import as_frame

WIDTHS = (0.25, 0.5, 0.75, 1.5, 2.0, 4.0)


def runs(optimum, variants=("dense", "peer"), budgets=(1e12, 4e12, 16e12), noise=0.0, seeds=1):
    """Rows on parabolas: optimum(variant, C) gives (N*, L*); tokens = C / (6 N)."""
    rng = np.random.default_rng(0)
    rows = []
    for variant in variants:
        for C in budgets:
            N_star, L_star = optimum(variant, C)
            for width in WIDTHS:
                for seed in range(seeds):
                    N = N_star * width
                    loss = L_star + 0.05 * np.log(width) ** 2 + noise * rng.standard_normal()
                    rows.append(
                        {
                            "study": "made", "variant": variant, "ffw": variant, "size": f"x{width}",
                            "budget": C, "seed": seed, "status": "done", "causal": variant != "moe",
                            "num_params_total": N, "num_params_active": N, "tokens": C / (6 * N),
                            "flops": C, "loss": loss, "run_id": f"{variant}-{C:g}-{width}-{seed}",
                        }
                    )  # fmt: skip
    return as_frame(rows)


def known(variant, C):
    better = 0.1 if variant == "peer" else 0.0
    return 1e5 * (C / 1e12) ** 0.5, 3.0 * (C / 1e12) ** -0.1 - better
