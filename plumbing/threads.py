"""
Threads that wait. Imported before torch, because OpenMP reads its settings when it is loaded.

Waiting threads of OpenMP spin, and beside another busy program they take the time of the thread that they wait for.
After 1,000 rounds they now sleep. Seconds of a step of the built-in model with two threads, alone and beside one and
two busy programs: 2.3, 10 and 17 before; 2.6, 5 and 7 now. OMP_WAIT_POLICY=passive: 5, 2.7 and 8.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")
