"""plumbing/threads.py: OpenMP reads its settings when torch is loaded, so the programs import this first."""

import ast

import pytest
from conftest import ROOT


@pytest.mark.parametrize("program", ["train.py", "evaluate.py", "analyze.py"])
def test_the_programs_set_the_spin_count_before_torch_is_loaded(program):
    imports = [node for node in ast.parse((ROOT / program).read_text()).body if isinstance(node, ast.Import)]
    assert imports[0].names[0].name == "plumbing.threads"


def test_a_setting_of_the_users_own_stays(monkeypatch):
    import importlib
    import os

    import plumbing.threads

    for given, wanted in ((None, "1000"), ("7", "7")):
        monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
        if given:
            monkeypatch.setenv("GOMP_SPINCOUNT", given)
        importlib.reload(plumbing.threads)
        assert os.environ["GOMP_SPINCOUNT"] == wanted
