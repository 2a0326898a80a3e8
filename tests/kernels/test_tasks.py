"""Tasks of the persistent kernels: the order of heads, and scratch memory of launches."""

import pytest
import torch
from stem.kernels import tasks
from stem.kernels.tasks import BYTES_AT_ONCE, heads_at_once, launch_scratch, new_scratch


@pytest.mark.parametrize(
    "num_keys, head_dim, num_kv_heads, expected",
    [(1024, 128, 8, 8), (8192, 128, 8, 4), (8192, 64, 6, 6), (8192, 128, 6, 3), (32768, 128, 8, 1), (2**17, 128, 7, 1)],
)
def test_heads_in_turn_divide_all_heads_and_fit(num_keys, head_dim, num_kv_heads, expected):
    found = heads_at_once(num_keys, 2 * head_dim, num_kv_heads)
    assert found == expected and num_kv_heads % found == 0
    assert found == 1 or found * 2 * 2 * num_keys * head_dim <= BYTES_AT_ONCE


def test_scratch_is_no_inference_tensor():
    with torch.inference_mode():
        scratch = new_scratch(torch.device("cpu"), 3)
    assert not scratch.is_inference() and not scratch.any()


def test_launches_that_graphs_record_have_zeros_of_their_own(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(tasks, "FOR_GRAPHS", {})
    new = launch_scratch(cpu, 5)  # nothing was prepared
    tasks.FOR_GRAPHS[cpu] = left = new_scratch(cpu, 20)
    first, second = launch_scratch(cpu, 5), launch_scratch(cpu, 6)
    for x, num_tasks in ((new, 5), (first, 5), (second, 6)):
        assert len(x) >= 2 + 2 * num_tasks and not x.any()
        x.fill_(7)
    assert first.data_ptr() == left.data_ptr() and second.data_ptr() == first.data_ptr() + 4 * len(first)
    assert len(first) % 4 == 0  # 16 bytes
    many = launch_scratch(cpu, 30)  # more than is left
    assert not many.any() and many.data_ptr() not in (left.data_ptr(), second.data_ptr())
