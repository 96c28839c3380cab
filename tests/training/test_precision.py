"""The precision of products and convolutions for the length of a run."""

import pytest
import torch

from equigrad.training.precision import computing_in

CPU = torch.device("cpu")


def flags():
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(
    ("precision", "allowed"), [("float32", False), ("tf32", True), ("bf16", False)]
)
def test_torchs_settings_are_changed_within_and_restored_after_an_error(precision, allowed):
    before = flags()
    assert before == (False, True)  # torch's own: so that both a change and none are seen

    def work():
        with computing_in(precision, CPU):
            assert flags() == (allowed, allowed)
            assert torch.is_autocast_enabled("cpu") == (precision == "bf16")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert flags() == before
    assert not torch.is_autocast_enabled("cpu")
