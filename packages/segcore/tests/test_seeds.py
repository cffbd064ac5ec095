import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from segcore.seeds import derive

keys = st.lists(st.integers(-(2**63), 2**64), min_size=1, max_size=5)


def test_known_values():
    assert [derive(0), derive(0, 1), derive(1, 0)] == [872845860, 3878386670, 1289615134]


@given(keys, keys)
def test_seed_depends_on_every_key_and_on_nothing_else(a, b):
    assert 0 <= derive(*a) < 2**32
    assert (derive(*a) == derive(*b)) == (a == b)


def test_neighboring_keys_share_no_seed():
    seeds = {derive(0, iteration, position) for iteration in range(100) for position in range(16)}
    assert len(seeds) == 1600


def test_seed_is_the_same_in_another_process():
    code = "from segcore.seeds import derive; print(derive(7, 160_000, 3))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert int(done.stdout) == derive(7, 160_000, 3)
