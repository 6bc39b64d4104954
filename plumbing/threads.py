"""
Threads that wait. Imported before torch, because OpenMP reads its settings when it is loaded.

Waiting threads of OpenMP spin, and beside another busy program they take the time of the thread that they wait for.
After 1,000 rounds they now sleep: a step of the built-in model with two threads takes 2.3 s instead of 1.8 alone, and
5 s beside a busy program, where 100,000 rounds make it 54 (RESULTS.md, "Beside other programs").
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")
