"""A run's loss per source against its steps, as a picture."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PREFIX = "train/loss/"


def draw_loss_curve(metrics_jsonl: Path, png: Path, *, smooth: int = 20) -> None:
    """Draw train/loss/{source} of every source in the file; lines are means over `smooth` steps."""
    lines = [json.loads(line) for line in metrics_jsonl.read_text(encoding="utf-8").splitlines()]
    names = sorted({name for line in lines for name in line if name.startswith(PREFIX)})
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name in names:
        steps, losses = zip(*((line["train/global_step"], line[name]) for line in lines if name in line), strict=True)
        (faint,) = axes.plot(steps, losses, alpha=0.2, linewidth=0.8)
        means = [sum(losses[max(0, i - smooth + 1) : i + 1]) / min(smooth, i + 1) for i in range(len(losses))]
        label = f"{name.removeprefix(PREFIX)} ({means[-1]:.3f} at the end)"
        axes.plot(steps, means, color=faint.get_color(), label=label)
    # The first steps, from ln(vocabulary) down, would flatten everything that happens later.
    early = lines[len(lines) // 20]["train/loss"]
    axes.set(xlabel="optimizer step", ylabel="cross-entropy per token (nats)", ylim=(0, 1.5 * early))
    axes.set_title("Training loss per source", loc="left")
    axes.grid(alpha=0.3)
    axes.legend()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(png, dpi=120)
    plt.close(figure)
