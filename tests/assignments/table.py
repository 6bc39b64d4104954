"""Where the function of each exercise stands in the repository, and what it is worth. This is the only such list."""

import importlib

FUNCTIONS = {  # number: (module, function, points)
    "1.1": ("train", "rloo_advantages", 2),
    "1.2": ("train", "rloo_loss", 3),
    "1.3": ("model", "token_logps", 4),
    "1.4": ("model", "batches", 3),
    "1.5": ("train", "accumulate_gradient", 6),
    "1.6": ("train", "importance_weights", 2),
    "2.1": ("model", "steer", 4),
    "2.2": ("model", "site_module", 3),
    "2.3": ("model", "_add", 4),
    "2.4": ("model", "pick", 3),
    "2.5": ("train", "orthogonal", 2),
    "3.1": ("analyze", "read_out", 2),
    "3.2": ("analyze", "folded", 2),
    "3.3": ("analyze", "largest_shifts", 4),
    "3.4": ("analyze", "persistence_of", 4),
    "3.5": ("analyze", "lines_past", 3),
    "3.6": ("analyze", "block_after", 2),
    "3.7": ("analyze", "recovery", 3),
    "3.8": ("analyze", "pair_gain", 4),
    "3.9": ("evaluate", "resamples", 3),
}
ALSO = {"Estimate": "evaluate", "Rollouts": "model", "steer": "model"}  # what the cases take from the repository
# the modules in which `run` puts a student's functions in place of the repository's
PROGRAMS = ("model", "rewards", "train", "evaluate", "analyze", "data.problems", "plumbing.fast", "plumbing.processes")
KEPT = "plumbing.files"  # the module of checksum, kept and keep


def named(name: str):
    """One of ALSO."""
    return getattr(importlib.import_module(ALSO[name]), name)
