"""A few of the inputs of `make fuzz`."""

import pytest
import torch

from tests.fuzz import READERS, fuzz


@pytest.mark.parametrize("name", READERS)
def test_damaged_and_made_up_files_end_in_a_documented_error(name):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert fuzz(name, range(2000 // len(READERS))) == []
    finally:
        torch.set_num_threads(threads)
