"""stem.kernels.launch: a launch does what kernel[grid] does, whatever was launched before it."""

import ctypes
import struct
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from stem.kernels import driver
from stem.kernels import launch as module
from stem.kernels.common import at_least_sm90
from stem.kernels.driver import DirectLaunch
from stem.kernels.launch import Tiles, compiling_together, launch, variant_key
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait, globaltimer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: the interpreter has no variants")


@triton.jit
def scale_kernel(x_ptr, bias_ptr, out_ptr, count, factor, SIZE: tl.constexpr, SHIFT: tl.constexpr):
    lanes = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    x = tl.load(x_ptr + lanes, mask=lanes < count, other=0.0).to(tl.float32) * factor + SHIFT
    if bias_ptr is not None:
        x += tl.load(bias_ptr + lanes, mask=lanes < count, other=0.0)
    tl.store(out_ptr + lanes, x, mask=lanes < count)


@triton.jit
def slow_kernel(ready_ptr, ends_ptr, CAN_OVERLAP: tl.constexpr):
    """Let the next kernel begin, take 0.2 ms, and write what it waits for, and when."""
    if CAN_OVERLAP:
        gdc_launch_dependents()
    start = globaltimer()
    while globaltimer() - start < 200_000:
        pass
    tl.store(ready_ptr + tl.program_id(0), 1)
    tl.store(ends_ptr + tl.program_id(0), globaltimer())


@triton.jit
def next_kernel(ready_ptr, found_ptr, starts_ptr, CAN_OVERLAP: tl.constexpr):
    """Write when it begins, and what the other kernel left."""
    tl.store(starts_ptr + tl.program_id(0), globaltimer())
    if CAN_OVERLAP:
        gdc_wait()
    tl.store(found_ptr + tl.program_id(0), tl.load(ready_ptr + tl.program_id(0)))


def scaled(x, bias, factor, shift=1.0, size=16, count=None, **options):
    """Result of the kernel for x; elements from `count` on stay -1."""
    count = len(x) if count is None else count
    out = torch.full((len(x),), -1.0, device=x.device)
    launch(scale_kernel, (-(-count // size),), (x, bias, out), (count, factor), SIZE=size, SHIFT=shift, **options)
    return out


def draw(*shape, **options):
    return torch.randn(*shape, device=DEVICE, **options)


@pytest.mark.parametrize("count", [1, 16, 17, 96, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_types_numbers_and_missing_tensors_each_have_their_variant(count, dtype):
    x, bias = draw(100).to(dtype), draw(100)
    for factor in (2.0, 3.0):
        for added in (bias, None):
            expected = x.float() * factor + 1 + (0 if added is None else added)
            out = scaled(x, added, factor, count=count)
            torch.testing.assert_close(out[:count], expected[:count])
            assert (out[count:] == -1).all()


def test_constants_and_options_each_have_their_variant():
    x = draw(64)
    for size, shift, warps in ((16, 1.0, 1), (16, 2.0, 1), (32, 2.0, 2), (16, 1.0, 4)):
        torch.testing.assert_close(scaled(x, None, 1.0, shift, size, num_warps=warps), x + shift)


def test_tensors_that_are_not_aligned():
    x, out = draw(65), torch.zeros(64, device=DEVICE)
    for start in (0, 1, 0):
        launch(scale_kernel, (4,), (x[start : start + 64], None, out), (64, 1.0), SIZE=16, SHIFT=0.0)
        assert torch.equal(out, x[start : start + 64])


@on_gpu
def test_what_decides_the_variant():
    x = draw(64)
    same, addresses, layouts = variant_key(scale_kernel, 0, (x, None), (1, 2.0), dict(SIZE=16))
    assert addresses == [x.data_ptr(), 0] and layouts == []
    assert same == variant_key(scale_kernel, 0, (draw(64), None), (1, 2.0), dict(SIZE=16))[0]
    assert variant_key(scale_kernel, 0, (x[1:], None), (1, 2.0), dict(SIZE=16))[0] is None
    others = (
        ((x.half(), None), (1, 2.0), dict(SIZE=16)),
        ((x, x), (1, 2.0), dict(SIZE=16)),
        ((x, None), (2, 2.0), dict(SIZE=16)),
        ((x, None), (1, 2.0), dict(SIZE=32)),
    )
    assert same not in [variant_key(scale_kernel, 0, *arguments)[0] for arguments in others]


@on_gpu
def test_few_variants_are_remembered(monkeypatch):
    monkeypatch.setattr(module, "VARIANTS", {})
    monkeypatch.setattr(module, "MOST_VARIANTS", 2)
    x = draw(64)
    for count in (16, 32, 48, 64, 16):
        out = scaled(x, None, 1.0, 0.0, count=count)
        assert torch.equal(out[:count], x[:count])
        assert 1 <= len(module.VARIANTS) <= 2


def test_variants_are_compiled_together_and_nothing_runs(monkeypatch):
    met, hashed, together = [], [], threading.Barrier(2, timeout=60)

    class Kernel:
        cache_key = property(lambda self: hashed.append(threading.current_thread()))

    def remember(key, kernel, grid, tensors, numbers, constants):
        met.append((key, kernel, grid, constants))
        together.wait()  # which the other variant must reach as well

    monkeypatch.setattr(module, "remember", remember)
    monkeypatch.setattr(module, "VARIANTS", {"known": None})
    monkeypatch.setattr(module, "variant_key", lambda kernel, device, tensors, numbers, constants: (numbers[0], [], []))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    kernel, x, out = Kernel(), torch.ones(16), torch.zeros(16)
    with compiling_together():
        for key in ((1, 0), (2, 0), (1, 0), "known", None):
            launch(kernel, (1,), (x, None, out), (key, 2.0), SIZE=16, SHIFT=0.0)
    assert sorted(key for key, *_ in met) == [(1, 0), (2, 0)]
    assert all(rest == [kernel, (1,), dict(SIZE=16, SHIFT=0.0)] for _, *rest in met)
    assert hashed == [threading.current_thread()] * 2  # in the order of the launches
    assert module.COMPILE.get() is None


def test_the_kernel_launched_last_is_compiled_first(monkeypatch):
    met = []
    monkeypatch.setattr(module, "COMPILERS", 1)
    monkeypatch.setattr(module, "remember", lambda key, *arguments: met.append(key))
    monkeypatch.setattr(module, "variant_key", lambda kernel, device, tensors, numbers, constants: (numbers, [], []))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    with compiling_together():
        for shift in (1.0, 2.0, 3.0):
            launch(SimpleNamespace(cache_key=""), (1,), (torch.ones(16),) * 3, (16, shift), SIZE=16, SHIFT=0.0)
        assert met == []
    assert met == [(16, 3.0), (16, 2.0), (16, 1.0)]


def test_an_error_of_the_compiler_is_raised(monkeypatch):
    monkeypatch.setattr(module, "remember", lambda *arguments: 1 / 0)
    monkeypatch.setattr(module, "variant_key", lambda *arguments: ((1, 0), [], []))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    with pytest.raises(ZeroDivisionError), compiling_together():
        launch(SimpleNamespace(cache_key=""), (1,), (torch.ones(16),) * 3, (16, 2.0), SIZE=16, SHIFT=0.0)
    assert module.COMPILE.get() is None


@on_gpu
def test_compiled_together_and_one_by_one():
    x = torch.arange(40.0, device=DEVICE)
    before = set(module.VARIANTS)
    with compiling_together():
        found = [scaled(x, None, 2.0, shift, size=32) for shift in (0.125, 0.375)]
    assert len(set(module.VARIANTS) - before) == 2 and all(torch.equal(out, -torch.ones_like(x)) for out in found)
    for shift in (0.125, 0.375):
        assert torch.equal(scaled(x, None, 2.0, shift, size=32), 2 * x + shift)
    assert len(set(module.VARIANTS) - before) == 2


def test_parameters_are_where_the_kernel_finds_them(monkeypatch):
    """A descriptor, an address, a missing tensor, 7, a 1 that is a constant, and 0.5; then two scratch memories."""
    x, y = torch.empty(2, 3, 64, 128, dtype=torch.float16), torch.empty(4)
    kinds = ["tensordesc<fp16[1,1,64,64]>", "*fp32", "constexpr", "i32", "constexpr", "fp32", "constexpr"]
    metadata = SimpleNamespace(tensordesc_meta=[dict(swizzle=3, block_size=[1, 1, 64, 64], fp4_padded=False)])
    variant = SimpleNamespace(src=SimpleNamespace(signature=dict(enumerate(kinds))), metadata=metadata)
    tensors = Tiles(x, (1, 1, 64, 64), None), y, None
    parameters = driver.Parameters.of(variant, tensors, (7, 1, 0.5))

    encode = SimpleNamespace(cuTensorMapEncodeTiled=lambda place, *_: ctypes.memset(place, 5, 128) and 0)
    monkeypatch.setattr(driver, "cuda_driver", lambda: encode)
    tensor_map = driver.described.__wrapped__(x.data_ptr(), x.shape, x.stride(), x.dtype, *parameters.boxes[0][1:])
    slots = struct.pack("=" + "".join(parameters.slots), tensor_map, y.data_ptr(), 0) + parameters.numbers
    found = [slots[a : a + size] for a, size in zip(parameters.places, parameters.sizes, strict=True)]
    forms = "128s4i4qQifQQ"
    values = [b"\5" * 128, *x.shape, *x.stride(), y.data_ptr(), 7, 0.5, 0, 0]
    assert b"".join(found) == struct.pack("=" + forms, *values)
    assert parameters.places[0] % driver.MAP_ALIGNMENT == 0
    variant.src.signature[3] = "fp8"
    assert driver.Parameters.of(variant, tensors, (7, 1, 0.5)) is None


def test_sizes_of_parameters():
    ptx = """
.visible .func helper(.param .b32 one) { }
.visible .entry some_kernel(
	.param .align 64 .b8 some_kernel_param_0[128],
	.param .u32 some_kernel_param_1,
	.param .u64 .ptr .global .align 1 some_kernel_param_2,
	.param .f32 some_kernel_param_3
)
.reqntid 128
{ .param .b32 not_this; }
"""
    assert driver.parameter_sizes(ptx) == [128, 4, 8, 4]
    assert driver.parameter_sizes(".entry nothing()\n{ }") == []


@on_gpu
@pytest.mark.parametrize("start", [None, lambda *_: 1], ids=["not understood", "refused by the driver"])
def test_triton_launches_what_the_driver_does_not(monkeypatch, start):
    monkeypatch.setattr(module, "VARIANTS", {})
    monkeypatch.setattr(DirectLaunch, "of", lambda *_: start)
    x, bias = draw(100), draw(100)
    torch.testing.assert_close(scaled(x, bias, 2.0), 2 * x + 1 + bias)
    assert [variant.direct for variant in module.VARIANTS.values()] == [start]


@on_gpu
def test_the_driver_launches_what_triton_compiled(monkeypatch):
    monkeypatch.setattr(module, "VARIANTS", {})
    for count in (1, 16, 100):
        scaled(draw(100), None, 2.0, count=count)
    assert [type(variant.direct) for variant in module.VARIANTS.values()] == [DirectLaunch] * 3


@on_gpu
def test_profilers_are_told(monkeypatch):
    names, hook = [], triton.knobs.runtime.launch_enter_hook
    hook.add(told := lambda metadata: names.append(metadata.get()["name"]))
    try:
        x = draw(64)
        torch.testing.assert_close(scaled(x, None, 2.0, 0.0), 2 * x)
    finally:
        hook.remove(told)
    assert names == ["scale_kernel"]


@on_gpu
def test_threads_that_launch_one_variant():
    wrong = []

    def work(seed):
        for turn in range(200):
            x = torch.full((64,), float(200 * seed + turn), device=DEVICE)
            if not torch.equal(scaled(x, None, 2.0, 0.0), 2 * x):
                wrong.append((seed, turn))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_what_can_overlap():
    assert not at_least_sm90(torch.device("cpu"))


@pytest.mark.skipif(not at_least_sm90(torch.device(DEVICE)), reason="needs a GPU of compute capability 9.0 or newer")
@pytest.mark.parametrize("in_graph", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
def test_a_kernel_begins_before_the_one_before_it_ends(overlap, in_graph):
    ready, found = torch.zeros(2, 8, dtype=torch.int32, device=DEVICE)
    starts, ends = torch.zeros(2, 8, dtype=torch.int64, device=DEVICE)

    def call():
        launch(slow_kernel, (8,), (ready, ends), (), CAN_OVERLAP=True)
        launch(next_kernel, (8,), (ready, found, starts), (), overlap=overlap, CAN_OVERLAP=True)

    call()
    if in_graph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
    for _ in range(3):
        ready.zero_(), found.zero_()
        graph.replay() if in_graph else call()
        assert found.all()
        assert bool(starts.max() < ends.min()) is overlap


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_another_device_than_the_current_one():
    for index in (1, 0):
        x = torch.randn(64, device=f"cuda:{index}")
        torch.testing.assert_close(scaled(x, None, 2.0, 0.0), 2 * x)


def test_a_prepared_launch_holds_each_address_where_the_driver_reads_it(monkeypatch):
    """An address is in its slot, and a tensor map lies at a multiple of 64 bytes."""
    library = SimpleNamespace(
        cuLaunchKernelEx=(signature := ctypes.CFUNCTYPE(ctypes.c_int))(lambda: 7),
        cuTensorMapEncodeTiled=lambda target, *_: ctypes.memset(target, 5, driver.MAP_BYTES) and 0,
    )
    monkeypatch.setattr(driver, "cuda_driver", lambda: library)
    layout = driver.Parameters()
    layout.add_address(missing=True)
    layout.add_tensor_map(2, 3, (16, 64))
    layout.add_address(missing=False)
    layout.add_number("i", 12)
    variant = SimpleNamespace(function=1, metadata=SimpleNamespace(num_warps=4, shared=0))
    start = DirectLaunch(variant, layout)
    prepared = [
        start.prepare((1, 1, 1), 0, [0, 1 << 20, address], [((32, 64), (64, 1), torch.bfloat16)], False)
        for address in (48, 64)
    ]
    _, (place, is_map), (slot, is_other) = prepared[0].slots
    assert is_map and not is_other and place % 64 == 0
    assert ctypes.string_at(place, driver.MAP_BYTES) == b"\5" * driver.MAP_BYTES
    ctypes.c_uint64.from_address(slot).value = 80
    found = []
    for address_of_launch, config, function, parameters in (x.start for x in prepared):
        assert signature(address_of_launch)() == 7 and config and function == 1
        tensor_map, *_, address, number = (ctypes.c_void_p * 7).from_address(parameters)
        found.append((ctypes.c_uint64.from_address(address).value, ctypes.c_int.from_address(number).value))
        assert tensor_map % 64 == 0
    assert found == [(80, 12), (64, 12)]
