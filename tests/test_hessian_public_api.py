import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pof

EXAMPLE = Path(__file__).parents[1] / "examples" / "own_network.py"


def test_importing_the_package_or_its_settings_does_not_load_torch():
    code = (
        "import sys, pof, pof.settings; "
        "assert 'torch' not in sys.modules; assert 'split' in dir(pof); "
        "assert pof.PoFSettings().gamma == 2; assert 'torch' not in sys.modules; "
        "pof.split; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=EXAMPLE.parents[1])


@pytest.mark.parametrize("name", pof.__all__)
def test_every_public_name_is_there_and_documented(name):
    assert getattr(pof, name).__doc__
    assert name in dir(pof)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'pof' has no attribute 'nonsense'"):
        _ = pof.nonsense


def test_the_example_holds_what_it_claims(capsys):
    state = torch.get_rng_state()
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    torch.set_rng_state(state)
    assert "largest eigenvalues" in capsys.readouterr().out
