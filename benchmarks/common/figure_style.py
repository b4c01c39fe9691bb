"""How pictures of benchmarks look: text that stays text, and the same bytes for the same figures."""

STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "dpo_ray",
    "font.size": 10.0,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dfe2e6",
    "grid.linewidth": 0.6,
}
