"""
Draw the picture of the idea for the README: data/idea.png.

$ python data/idea.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a window system is not needed for a PNG
import matplotlib.pyplot as plt
from matplotlib.patches import Circle, FancyBboxPatch

INK, GREY, LIGHT, PALE = "#22272e", "#6b7580", "#c3cad1", "#f5f7f9"
FROZEN, TRAINED, GOOD, BAD = "#e3e8ed", "#d9601a", "#2166ac", "#b2182b"
ANSWERS = [("2", 1), ("9", 0), ("", 0), ("2", 1)]  # what stands in the box, if one is there, and the reward
VALUES = [0.6, -0.9, 0.3, 1.0, -0.5, 0.8, -0.2, -1.0]  # of the vector, for its colours
PROBLEM = "Start with 16,\nadd 1,\nsubtract 15.\nWhat is the\nresult?"


def box(ax, x, y, w, h, text="", face=FROZEN, edge=LIGHT, size=10, level=4):
    """A rounded box with its centre at (x, y). level: what it covers, the stream has 3."""
    style = "round,pad=0,rounding_size=0.8"
    ax.add_patch(FancyBboxPatch((x - w / 2, y - h / 2), w, h, boxstyle=style, fc=face, ec=edge, lw=1, zorder=level))
    ax.text(x, y, text, ha="center", va="center", color=INK, size=size, zorder=5)


def arrow(ax, *points, color=INK, width=1.4):
    """A line through the points, with a head at the last one."""
    ax.plot(*zip(*points[:-1]), color=color, lw=width, solid_joinstyle="round", zorder=3)
    style = dict(arrowstyle="-|>", color=color, lw=width, shrinkA=0, shrinkB=0, mutation_scale=12)
    ax.annotate("", points[-1], points[-2], arrowprops=style, zorder=3)


def draw_model(ax, y, plus):
    """The frozen model with its residual stream from left to right; the vector is added at x = plus."""
    ax.text(35.5, y + 9.6, "frozen LLM: no weight changes", ha="center", color=GREY)
    box(ax, 35.5, y, 37, 16, face=PALE, level=2)
    arrow(ax, (14, y), (62, y), width=2)
    for x, name in ((22, "block\n0"), (33, "block\n$l$"), (49.5, "block\n$L-1$")):
        box(ax, x, y, 6.6, 9, name)
    for x in (27.5, 44.2):
        ax.text(x, y + 0.4, "…", ha="center", va="center", size=12, zorder=4, bbox=dict(fc=PALE, ec="none", pad=1))
    ax.text(plus, y + 4, "$h_l + s_l$", ha="center", color=TRAINED, size=11)
    ax.text(18.7, y - 6.9, "residual stream $h$", color=GREY, size=9, zorder=5)
    ax.add_patch(Circle((plus, y), 1.5, fc="white", ec=TRAINED, lw=1.8, zorder=4))
    ax.plot([plus - 0.8, plus + 0.8], [y, y], [plus, plus], [y - 0.8, y + 0.8], color=TRAINED, lw=1.8, zorder=5)


def draw_vector(ax, x, top):
    """s_l, a column of numbers, on its way into the stream."""
    for i, value in enumerate(VALUES):
        face = plt.cm.RdBu(0.5 + 0.4 * value)
        ax.add_patch(plt.Rectangle((x - 1.1, top - 1.8 * (i + 1)), 2.2, 1.8, fc=face, ec="white", lw=1))
    ax.text(x - 2.6, top - 4, "steering vector $s_l$", ha="right", color=TRAINED, size=11)
    ax.text(x - 2.6, top - 7.2, "the only thing that is trained,", ha="right", color=GREY)
    ax.text(x - 2.6, top - 9.9, "added at every position", ha="right", color=GREY)


def draw_answers(ax, y):
    """k answers with their rewards and advantages, around height y."""
    for x, head in ((70.5, "sample\n$k$ answers"), (83, "box right?\nreward $r$"), (94, "$r$ − mean of\nthe others")):
        ax.text(x, y + 13.2, head, ha="center", va="center", color=GREY)
    rewards = [r for _, r in ANSWERS]
    for i, (answer, r) in enumerate(ANSWERS):
        row, color = y + 7.2 - 4.8 * i, GOOD if r else BAD
        box(ax, 70.5, row, 15.5, 3.7, face="white")
        ax.text(63.7, row, "To find … is" if answer else "Think about …", va="center", color=GREY, size=8.5, zorder=5)
        if answer:
            box(ax, 75.5, row, 3, 2.5, answer, face="white", edge=INK, size=9)
        ax.text(83, row, r, ha="center", va="center", color=color, size=11)
        advantage = r - (sum(rewards) - r) / (len(rewards) - 1)
        ax.text(94, row, f"{advantage:+.2f}".replace("-", "−"), ha="center", va="center", color=color, size=11)


def main():
    fig = plt.figure(figsize=(8, 3.48))
    ax = fig.add_axes([0, 0, 1, 1], xlim=(0, 100), ylim=(8.5, 52))
    ax.axis("off")
    y, plus = 36, 40
    box(ax, 7.5, y, 13, 13, PROBLEM, face="white", size=8.5)
    draw_model(ax, y, plus)
    draw_vector(ax, plus, 24.5)
    arrow(ax, (plus, 25), (plus, y - 1.7), color=TRAINED, width=1.8)
    draw_answers(ax, y)
    arrow(ax, (94, y - 9.8), (94, 17.3), (plus + 2, 17.3), color=TRAINED, width=1.8)
    ax.text(67, 19, "one Adam step", ha="center", color=TRAINED, size=11)
    ax.text(67, 14, "answers better than the others become likelier", ha="center", color=GREY)
    fig.savefig(Path(__file__).with_name("idea.png"), dpi=200, facecolor="white")


if __name__ == "__main__":
    main()
