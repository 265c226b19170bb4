"""A figure of a comparison: the gaps at equal FLOPs. Nothing is computed here."""

from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from analysis.claims import Claim
from analysis.equal_cost import View
from analysis.figures import STYLE, looks
from analysis.load import display_name
from analysis.verdicts import Comparison
from peer_scaling.record import budget_label

BASELINE = "dense"


def plot_gaps(comparison: Comparison, reference: str = BASELINE) -> Figure:
    """Nats below `reference` at equal training FLOPs over the budget, with 95 % intervals; hollow
    where a loss is no language model's, so that the pair is not ranked.
    """
    claims = [
        claim
        for claim in comparison.claims[View.FLOPS]
        if claim.pair.reference == reference and claim.difference is not None
    ]
    variants = list(dict.fromkeys(claim.pair.variant for claim in claims))
    with style.context(STYLE):
        figure = Figure((5.2, 3.6))
        ax = figure.subplots()
        ax.axhline(0, color="black", lw=1, label=reference)
        for i, (variant, look) in enumerate(looks(variants).items()):
            own = [claim for claim in claims if claim.pair.variant == variant]
            # Beside one another: intervals of one budget would hide each other.
            shift = 1.03 ** (i - (len(variants) - 1) / 2)
            ax.errorbar(
                [claim.pair.budget * shift for claim in own],
                [claim.difference.nats for claim in own if claim.difference],
                yerr=[_margin(claim) for claim in own],
                color=look.colour, marker=look.marker, capsize=2, elinewidth=0.9,
                mfc="white" if not own[0].ranked else look.colour,
                label=display_name(variant, comparison.frame),
            )  # fmt: skip
        ax.set(xscale="log", xlabel="training FLOPs", ylabel=f"nats below {reference}")
        ax.xaxis.set_major_locator(FixedLocator(comparison.fit.budgets))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda budget, _: budget_label(budget)))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.legend(fontsize=8)
    return figure


def _margin(claim: Claim) -> float:
    return claim.difference.margin if claim.difference else float("nan")
