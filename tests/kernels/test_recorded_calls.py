"""Recorded calls: the same bits as the calls themselves, as often as they are run, from any thread."""

import _thread
import contextvars
import copy
import gc
import pickle
import sys
import threading
import time
import weakref

import pytest
import torch

from diffusion.kernels import StepCoefficients, _native, reverse_step_, step_counter
from diffusion.kernels._recorded_calls import recording
from diffusion.kernels.ops.convolution.library import convolution_
from diffusion.kernels.ops.convolution.packing import choose_packing, pack
from diffusion.kernels.ops.group_norm_silu.library import group_norm_affine_
from helpers.processes import start_python

pytestmark = pytest.mark.skipif(_native.CPP_MISSING is not None, reason=str(_native.CPP_MISSING))


def make_calls(batch=2, seed=0):
    """A norm and the convolution that reads its result, with the convolution's input and output."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 32, 8, 8, generator=generator).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(16, 32, 3, 3, generator=generator)
    packed = pack(weight, choose_packing(weight.shape, 8, 8, torch.float32, _native.simd_in_use()))
    map = torch.empty(4 if packed.packing.amx_limbs == 3 else 3, batch, 32)
    out = torch.zeros(batch, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    norm = (x, 8, None, None, 1e-5, None, None, None, True, map)
    conv = (
        x,
        packed.data,
        3,
        1,
        1,
        1,
        packed.packing.winograd_m,
        packed.packing.amx_limbs,
        None,
        map,
        True,
        None,
        out,
    )
    return x, out, [(group_norm_affine_, norm), (convolution_, conv)]


def call_all(calls):
    for function, arguments in calls:
        function(*arguments)


def record(calls):
    with recording() as recorded:
        call_all(calls)
    return recorded


def test_recorded_calls_do_what_the_calls_do():
    x, out, calls = make_calls()
    recorded = record(calls)
    assert len(recorded) == 2
    assert not out.any()  # nothing has run yet
    for _ in range(2):
        x.normal_()
        call_all(calls)
        expected = out.clone()
        out.zero_()
        recorded.run()
        assert torch.equal(out, expected)


def test_an_exception_ends_the_recording():
    """The exception passes, later calls run, and the incomplete recording does not."""
    _, out, calls = make_calls()
    refused = [calls[0], (group_norm_affine_, (*calls[0][1][:-1], torch.empty(3)))]
    recorded = recording()
    with pytest.raises(RuntimeError, match="affine must be"), recorded:
        call_all(refused)
    with pytest.raises(RuntimeError, match="the recording of these calls ended in an exception"):
        recorded.run()
    call_all(calls)
    assert out.any()


def test_each_thread_records_its_own_calls():
    _, out, calls = make_calls()
    _, other_out, other_calls = make_calls(seed=1)
    with recording() as recorded:
        thread = threading.Thread(target=call_all, args=(other_calls,))
        thread.start()
        thread.join()
        call_all(calls)
    assert len(recorded) == 2
    assert other_out.any()
    assert not out.any()


def test_recordings_nest():
    _, out, calls = make_calls()
    with recording() as outer:
        call_all(calls[:1])
        with recording() as inner:
            call_all(calls)
        with pytest.raises(RuntimeError, match="affine must be"), recording():
            group_norm_affine_(*calls[0][1][:-1], torch.empty(3))
        call_all(calls[1:])
    assert len(outer) == 2
    assert len(inner) == 2
    assert not out.any()
    outer.run()
    assert out.any()


def test_only_the_innermost_recording_of_the_thread_ends():
    outer, inner = recording(), recording()
    with outer:
        with inner:
            with pytest.raises(RuntimeError, match="before the recordings around it"):
                outer.__exit__(None, None, None)
            failed = []

            def leave():
                try:
                    inner.__exit__(None, None, None)
                except RuntimeError as error:
                    failed.append(str(error))

            thread = threading.Thread(target=leave)
            thread.start()
            thread.join()
            assert "in the thread that began it" in failed[0]
        call_all(make_calls()[2])
    assert len(outer) == 2


def test_a_recording_that_is_never_left():
    """The thread goes on recording until it ends, even if the recording's object is deleted."""

    def work():
        recording().__enter__()
        gc.collect()
        call_all(make_calls()[2])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    _, out, calls = make_calls()
    call_all(calls)
    assert out.any()


def test_calls_are_recorded_once_and_then_run():
    calls = recording()
    with pytest.raises(RuntimeError, match="has not ended"):
        calls.run()
    with calls:
        with pytest.raises(RuntimeError, match="has not ended"):
            calls.run()
        with pytest.raises(RuntimeError, match="were recorded before"):
            calls.__enter__()
    calls.run()
    with pytest.raises(RuntimeError, match="were recorded before"):
        calls.__enter__()


def test_recorded_calls_keep_their_tensors_and_no_longer():
    _, out, calls = make_calls()
    call_all(calls)
    expected, weight = out.clone(), weakref.ref(calls[1][1][1])
    recorded = record(calls)
    del calls
    gc.collect()
    assert weight() is not None
    torch.randn(1 << 16)
    recorded.run()
    assert torch.equal(out, expected)
    del recorded
    gc.collect()
    assert weight() is None


def test_empty_calls_leave_nothing():
    _, out, calls = make_calls(batch=0)
    recorded = record(calls)
    recorded.run()
    assert len(recorded) == 0
    assert out.shape == (0, 16, 8, 8)


def slow_calls(seconds=0.3):
    """Recorded calls whose run takes about so long."""
    _, out, calls = make_calls(batch=16)
    begin = time.perf_counter()
    call_all(calls)
    call_all(calls)
    count = max(2, int(2 * seconds / (time.perf_counter() - begin)))
    return out, record(calls * count)


def test_other_threads_run_meanwhile():
    """The GIL is released: this thread takes many turns while another runs recorded calls."""
    _, recorded = slow_calls()
    thread = threading.Thread(target=recorded.run)
    thread.start()
    turns = 0
    while thread.is_alive():
        time.sleep(0.001)
        turns += 1
        assert len(recorded) > 0  # does not wait for the run
    assert turns >= 10


def test_two_threads_take_turns():
    out, recorded = slow_calls(seconds=0.05)
    recorded.run()
    expected = out.clone()
    out.zero_()
    threads = [threading.Thread(target=recorded.run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(out, expected)


def test_another_context_of_the_thread_is_recorded_too():
    """A recording belongs to the thread, not to a context variable's scope."""
    _, out, calls = make_calls()
    with recording() as recorded:
        contextvars.copy_context().run(call_all, calls)
    assert len(recorded) == 2
    assert not out.any()


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_recorded_calls_are_not_copied(duplicate):
    with pytest.raises(TypeError, match=r"cannot pickle '.*RecordedCalls' object"):
        duplicate(record(make_calls()[2]))


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
def test_an_operator_without_memory_raises_memory_error():
    """A thread of PyTorch raises it, too, and the same calls run once there is memory again."""
    code = """if True:
        import resource, torch
        from diffusion.kernels import _native, conv3x3
        from diffusion.kernels._recorded_calls import recording
        from diffusion.kernels.ops.convolution.library import convolution_, convolution_arguments
        from diffusion.kernels.ops.convolution.packing import Packing, pack

        torch.set_num_threads(2)
        x = torch.ones(2, 64, 64, 64).contiguous(memory_format=torch.channels_last)
        out = torch.zeros(2, 64, 64, 64).contiguous(memory_format=torch.channels_last)
        weight = pack(torch.ones(64, 64, 3, 3), Packing(winograd_m=4)).data
        torch.zeros(1 << 20).add_(1)  # starts the threads
        with recording() as calls:
            convolution_(x, weight, 3, 1, 1, 1, 4, 0, None, None, False, None, out)
        used = 4096 * int(open("/proc/self/statm").read().split()[0])
        held = [bytearray(1 << 12) for _ in range(1 << 10)]
        resource.setrlimit(resource.RLIMIT_AS, (used, -1))
        while True:  # takes what malloc has left
            try:
                held.append(bytearray(1 << 18))
            except MemoryError:
                break
        try:
            calls.run()
        except MemoryError as error:
            said = repr(error)
        else:
            said = "it ran"
        resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
        calls.run()
        print(said, bool(((out[:, :, 1:-1, 1:-1] - 576).abs() < 576e-5).all()))
    """
    process = start_python(code)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert output == "MemoryError('std::bad_alloc') True\n"


def test_recorded_calls_run_within_other_recorded_calls():
    """As one call, which runs whenever the outer ones do."""
    _, out, calls = make_calls()
    inner = record(calls)
    with recording() as outer:
        inner.run()
        inner.run(2)
    assert len(outer) == 3
    assert not out.any()
    call_all(calls)
    expected = out.clone()
    out.zero_()
    del inner
    outer.run()
    assert torch.equal(out, expected)


def test_calls_run_many_times():
    x = torch.zeros(1, 2, 4)
    table = torch.zeros(5, 12, dtype=torch.float64)
    rows = [[2.0, i + 1] for i in range(5)]  # x becomes 2 x + (i + 1) out
    columns = [StepCoefficients._fields.index(name) for name in ("coef_x", "coef_output")]
    table[:, columns] = torch.tensor(rows, dtype=torch.float64)
    counter, ids, output = step_counter(0), torch.zeros(1, dtype=torch.int64), torch.ones(1, 2, 4)
    with recording() as calls:
        reverse_step_(x, output, table, counter, sample_ids=ids)
    calls.run(0)
    assert counter[0] == 0
    calls.run(3)
    calls.run(2)
    assert counter[0] == 5
    assert (x == 57).all()  # 1, 4, 11, 26, 57
    with pytest.raises(RuntimeError, match="step 5 is outside of the table's 5"):
        calls.run(2)
    with pytest.raises(ValueError, match="times must be at least 0"):
        calls.run(-1)


def test_ctrl_c_between_two_times():
    _, recorded = slow_calls(seconds=0.05)
    timer = threading.Timer(0.2, _thread.interrupt_main)
    timer.start()
    begin = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        recorded.run(2000)
    timer.join()
    assert time.perf_counter() - begin < 50


def test_other_threads_do_not_handle_signals():
    """Their calls go on, and the main thread raises."""
    out, recorded = slow_calls(seconds=0.05)
    thread = threading.Thread(target=recorded.run, args=(10,))
    thread.start()
    threading.Timer(0.1, _thread.interrupt_main).start()

    def wait():
        for _ in range(600):
            time.sleep(0.1)  # no signal interrupts a sleep here

    with pytest.raises(KeyboardInterrupt):
        wait()
    thread.join()
    assert out.any()
