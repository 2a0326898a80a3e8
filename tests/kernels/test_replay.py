"""stem.kernels.replay: a repeated call gives what the call itself gives, and what cannot be repeated is not."""

import ctypes
import subprocess
import sys
import threading
from itertools import count

import pytest
import torch
from stem.kernels import replay as module
from stem.kernels.driver import Prepared, address_of
from stem.kernels.launch import ON_LAUNCH
from stem.kernels.replay import Recorder, Recording, replay

import stem

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BYTES = 64 * 4  # of the tensors that the stand-in for a kernel copies


LAUNCH = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)


class Copy:
    """Stand-in for a DirectLaunch: copies one tensor into the other; `error` is what the driver returns."""

    error = 0

    def __init__(self):
        self.launch = LAUNCH(self.start)

    def __call__(self, grid, stream, addresses, layouts, overlap):
        source, target = addresses
        ctypes.memmove(target, source, BYTES)
        return self.error

    def start(self, config, function, parameters, extra):
        return self((1, 1, 1), 0, (ctypes.c_uint64 * 2).from_address(parameters), [], False)

    def prepare(self, grid, stream, addresses, layouts, overlap):
        buffers = (ctypes.c_uint64 * 2)(*addresses)
        place = ctypes.addressof(buffers)
        return Prepared((address_of(self.launch), 0, 0, place), [(place, False), (place + 8, False)], buffers)


COPY = Copy()


def copy(source, target, start=COPY):
    """A launch of it."""
    COPY((1, 1, 1), 0, [source.data_ptr(), target.data_ptr()], [None, None], False)
    note = ON_LAUNCH.get()
    if note:
        note(start, (1, 1, 1), (source, target), False)


def record(call, *inputs):
    with Recorder() as recorder:
        outputs = call(*inputs)
    return recorder.recording(inputs, outputs, stream=0)


def repeat(recording, *inputs):
    return recording.repeat(inputs[0], [x.data_ptr() for x in inputs])


def draw(*shape):
    return torch.randn(*shape or (64,))


def copy_by_way(x):
    """x, through the second half of a tensor in between."""
    between, out = torch.empty(128), torch.empty_like(x)
    copy(x, between[64:])
    copy(between[64:], out)
    return out, None


def test_a_recording_repeats_the_launches_with_other_tensors():
    recording = record(copy_by_way, draw())
    assert len(recording.kept[0]) >= 128 * 4  # the workspace
    x, y = draw(), draw()
    (first, nothing), (second, _) = repeat(recording, x), repeat(recording, y)
    assert torch.equal(first, x) and torch.equal(second, y) and nothing is None


def test_a_call_recorded_in_inference_mode_is_repeated_for_training():
    with torch.inference_mode():
        recording = record(copy_by_way, draw())
    out, _ = repeat(recording, draw())
    assert not out.is_inference()


def test_a_first_recording_does_not_import_the_compiler_of_torch():
    """That import took 4 to 6 s in the second call of each process."""
    program = "import sys, torch; from stem.kernels.replay import Recorder\n"
    program += "with torch.inference_mode(), Recorder() as recorder: torch.empty(4).view(2, 2)\n"
    program += "assert recorder.complete and recorder.bytes == 16 and 'torch._dynamo' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_calls_of_a_stream_share_their_intermediate_tensors(monkeypatch):
    monkeypatch.setattr(module, "WORKSPACES", {})
    first, second = record(copy_by_way, draw()), record(copy_by_way, draw())
    workspace, device = first.kept[0], torch.device("cpu")
    assert second.kept[0] is workspace and module.WORKSPACES == {(device, 0): workspace}
    assert len(module.workspace_of(device, 0, len(workspace) + 1)) > len(workspace)  # a larger one, from here on
    assert module.workspace_of(device, 1, 1) is not module.workspace_of(device, 0, 1)
    x = draw()
    assert torch.equal(repeat(first, x)[0], x)  # in the memory that it was recorded with
    monkeypatch.setattr(module, "MOST_STREAMS", 2)
    module.workspace_of(device, 2, 1)
    assert len(module.WORKSPACES) == 1


def test_threads_take_turns():
    """Launches of a call read what was written for it, also where several threads repeat one recording."""
    recording, wrong = record(copy_by_way, draw()), []

    def work():
        for _ in range(300):
            x = draw()
            if not torch.equal(repeat(recording, x)[0], x):
                wrong.append(x)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_outputs_have_their_strides():
    def transposed(x):
        out = torch.empty_strided((4, 16), (1, 4))
        copy(x, out)
        return (out,)

    x, other = draw(), draw(16, 4).t()  # empty_like keeps its strides
    assert torch.equal(repeat(record(transposed, draw()), x)[0], x.view(16, 4).T)
    like_first = record(transposed, other)
    assert like_first.outputs == [module.LIKE_FIRST]
    out = repeat(like_first, other)[0]
    assert torch.equal(out, other) and out.stride() == other.stride()


def test_what_stays_between_calls_is_kept():
    table = draw()

    def read_table(x):
        out, _ = copy_by_way(x)
        copy(table, out)
        return (out,)

    recording = record(read_table, draw())
    assert any(x is table for x in recording.kept) and torch.equal(repeat(recording, draw())[0], table)


def computes(x):
    out, _ = copy_by_way(x)
    return (out.mul_(2),)


def reads_a_part(x):
    out = torch.empty(64)
    copy(x[:64], out)
    copy(x[64:], out)
    return (out,)


def gives_back_its_input(x):
    copy_by_way(x)
    return (x,)


def gives_back_a_part(x):
    between = torch.empty(128)
    copy(x, between[64:])
    return (between[64:],)


def is_launched_by_triton(x):
    out = torch.empty(64)
    copy(x, out, start=None)
    return (out,)


def launches_nothing(x):
    return (torch.empty_like(x),)


@pytest.mark.parametrize(
    "call",
    [computes, reads_a_part, gives_back_its_input, gives_back_a_part, is_launched_by_triton, launches_nothing],
)
def test_what_cannot_be_repeated(call):
    assert record(call, draw(128) if call is reads_a_part else draw()) is None


def test_a_call_that_allocates_much_is_not_recorded(monkeypatch):
    monkeypatch.setattr(module, "MOST_BYTES", 3 * BYTES - 1)  # it takes three times as much
    assert record(copy_by_way, draw()) is None
    with Recorder() as recorder:
        copy_by_way(draw())
    assert recorder.allocated == []  # and holds no memory longer than the call does
    monkeypatch.setattr(module, "MOST_BYTES", 3 * BYTES)
    assert record(copy_by_way, draw()) is not None
    monkeypatch.setattr(module, "MOST_WORKSPACE", 2 * BYTES - 1)  # its intermediate tensor
    assert record(copy_by_way, draw()) is None


def test_inputs_at_one_address_are_not_told_apart():
    def copy_second(x, y):
        return copy_by_way(y)

    x, y = draw(), draw()
    assert record(copy_second, x, x) is None
    assert torch.equal(repeat(record(copy_second, draw(), draw()), x, y)[0], y)


def test_a_refused_launch_gives_nothing():
    refused = Copy()

    def call(x):
        out, _ = copy_by_way(x)
        copy(x, out, refused)
        return (out,)

    recording = record(call, draw())
    assert repeat(recording, draw()) is not None
    refused.error = 1
    assert repeat(recording, draw()) is None


def test_launches_of_other_threads_are_not_noted():
    with Recorder() as recorder:
        thread = threading.Thread(target=copy_by_way, args=(draw(),))
        thread.start()
        thread.join()
    assert recorder.launches == [] and recorder.allocated == []


CONFIGS = {
    "paper": stem.StemConfig.preset("paper"),
    "adaptive": stem.StemConfig.preset("adaptive", dense_up_to=0),
    "forced alone": stem.StemConfig(),
}


def qkv(seed, tokens=2048, dtype=torch.bfloat16, fused=False):
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(1, tokens, 8 + 2 + 2, 128, generator=generator, device="cuda").to(dtype)
    parts = x.transpose(1, 2).split((8, 2, 2), dim=1)
    return parts if fused else tuple(part.contiguous() for part in parts)


@pytest.fixture
def recordings(fresh_plans):
    """Recordings of all plans, by plan and stream."""
    return lambda: [each for plan in stem.planning.PLANS.values() for each in plan.recordings.values()]


def expected(q, k, v, config, **options):
    """By a call that is never repeated."""
    return stem.stem_attention(q, k, v, config, return_selection=True, **options)[0]


@on_gpu
@pytest.mark.parametrize("impl", [None, "triton"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_repeated_calls_of_the_operator(recordings, name, fused, impl):
    for seed in range(4):
        inputs = qkv(seed, fused=fused)
        out = stem.stem_attention(*inputs, CONFIGS[name], impl=impl)
        assert torch.equal(out, expected(*inputs, CONFIGS[name], impl=impl))
        assert out.stride() == expected(*inputs, CONFIGS[name], impl=impl).stride()
    assert [type(x) for x in recordings()] == [Recording]


@on_gpu
def test_every_option_has_its_recording(recordings):
    number = count()
    for config in (*CONFIGS.values(), stem.StemConfig(k_start=1), stem.StemConfig(k_start=1.0, decay=0.5)):
        for options in (dict(), dict(scale=0.5), dict(prompt_length=2176), dict(impl="triton"), dict(return_lse=True)):
            for tokens, dtype in ((2048, torch.bfloat16), (2048, torch.float16), (2001, torch.bfloat16)):
                for _ in range(3):
                    inputs = qkv(next(number), tokens, dtype)
                    found = stem.stem_attention(*inputs, config, **options)
                    out, *lse = found if options.get("return_lse") else (found,)
                    again, _, *lse_again = stem.stem_attention(*inputs, config, return_selection=True, **options)
                    assert torch.equal(out, again)
                    assert all(map(torch.equal, lse, lse_again))
    assert len(recordings()) == 5 * 5 * 3


@on_gpu
def test_recordings_of_other_streams_and_threads(recordings):
    config, wrong = CONFIGS["paper"], []

    def work(seed):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for turn in range(20):
                inputs = qkv(20 * seed + turn)
                out = stem.stem_attention(*inputs, config)
                if not torch.equal(out, expected(*inputs, config)):
                    wrong.append((seed, turn))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and len(recordings()) == 4


@on_gpu
def test_what_is_not_repeated(recordings):
    config = CONFIGS["paper"]
    q, k, v = qkv(0)
    for _ in range(3):
        out = stem.stem_attention(q.requires_grad_(), k, v, config)
        out.sum().backward()
        stem.stem_attention(q.detach(), k, v, config, return_selection=True)
        stem.stem_attention(q.detach(), k, v, config, impl="torch")
    shifted = torch.empty(k.numel() + 1, dtype=k.dtype, device="cuda")[1:].view_as(k).copy_(k)
    for _ in range(3):
        torch.testing.assert_close(stem.stem_attention(q.detach(), shifted, v, config), out)
    assert recordings() == []
    for _ in range(3):
        same = stem.stem_attention(q.detach(), k, k, config)
    assert recordings() == [None] and torch.equal(same, expected(q.detach(), k, k, config))


@on_gpu
def test_a_graph_after_repeated_calls(recordings):
    config, inputs = CONFIGS["paper"], qkv(0)
    for _ in range(3):
        stem.stem_attention(*inputs, config)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = stem.stem_attention(*inputs, config)
    for x, y in zip(inputs, qkv(1), strict=True):
        x.copy_(y)
    graph.replay()
    assert torch.equal(out, expected(*inputs, config))


@on_gpu
def test_few_recordings_are_kept(recordings, monkeypatch):
    monkeypatch.setattr(stem.planning, "MOST_PLANS", 2)
    for tokens in (1024, 2048, 3072, 4096, 1024):
        for _ in range(3):
            inputs = qkv(tokens, tokens)
            assert torch.equal(stem.stem_attention(*inputs), expected(*inputs, stem.StemConfig()))
            assert len(recordings()) <= 2


@on_gpu
def test_a_first_call_is_not_recorded(recordings):
    inputs, calls = qkv(0), []

    def call():
        calls.append(len(calls))
        return (stem.stem_attention(*inputs, return_selection=True)[0],)

    of_this_call = {}
    for _ in range(4):
        replay(of_this_call, inputs, call)
    assert calls == [0, 1]


@on_gpu
@pytest.mark.parametrize("name, together", [("adaptive", True), ("softmax", False)])
def test_a_first_call_compiles_everything_before_it_runs(fresh_plans, monkeypatch, name, together):
    from stem.kernels import launch

    happened, original = [], launch.remember
    monkeypatch.setattr(launch, "VARIANTS", {})
    monkeypatch.setattr(launch, "remember", lambda *args: happened.append("compile") or original(*args))
    config = stem.StemConfig.preset("adaptive", dense_up_to=0)
    if name == "softmax":  # torch works on intermediate results, which must be there
        config = stem.StemConfig.preset("paper", reduction="softmax")
    inputs = qkv(3000, 3000)
    token = launch.ON_LAUNCH.set(lambda *launched: happened.append("launch"))
    try:
        out = stem.stem_attention(*inputs, config)
    finally:
        launch.ON_LAUNCH.reset(token)
    assert happened.count("compile") > 2 and (happened == sorted(happened)) == together
    assert torch.equal(out, stem.stem_attention(*inputs, config))
